"""A throttled sample's loss counts less in the training, and its row says what it would be without that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from diffhook import Alerts, open_log
from diffhook.analysis.sample_table import sample_table
from diffhook.integrations.accelerate import DiffHook
from diffhook.log.samples import name_id
from diffhook.report.parts.run import read_summary
from tests.integrations.given_factors import given_factors
from tests.integrations.trainers import TRAINERS, Trainer
from tests.integrations.trainers.commands import COMMANDS, install, run
from tests.integrations.trainers.trainer import Visit
from tests.runs import SCHEDULER, TinyDenoiser, identified
from tests.twins import relative_error, sample_gradients

GIVEN = {2: 0.25, 7: 0.625}
COUNT, BATCH = 12, 4
BROKEN = 5


class Recomputed(TinyDenoiser):
    """Computes its layers again in the backward."""

    reentrant = False

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> Any:
        inside = super().forward
        sample = sample.detach().requires_grad_()
        found: Tensor = checkpoint(
            lambda x, t: inside(x, t)[0], sample, timestep, use_reentrant=self.reentrant
        )  # type: ignore[no-untyped-call]
        return (found,)


class Reentrant(Recomputed):
    reentrant = True


def losses(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    clean, noise, timesteps, target = batch
    predicted = model(SCHEDULER.add_noise(clean, noise, timesteps), timesteps, return_dict=False)[0]
    return (predicted - target).square().flatten(1).mean(1)


def twice(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """A loss of two calls of the denoiser at the same timesteps."""
    clean, noise, timesteps, target = batch
    noisy = SCHEDULER.add_noise(clean, noise, timesteps)
    first, second = (model(x, timesteps, return_dict=False)[0] for x in (noisy, noisy.flip(-1)))
    return (first + second.flip(-1) - 2 * target).square().flatten(1).mean(1)


class Training:
    """A loop that diffhook sees, or one that multiplies the losses itself.

    Args:
        log: None: without us.
        factors: step → sample → factor, of the loop's own.
        options: of DiffHook.
    """

    loss: Any = staticmethod(losses)
    parts = 1

    def __init__(
        self,
        log: Path | None,
        factors: Any = None,
        kind: type[nn.Module] = TinyDenoiser,
        accumulation: int = 1,
        **options: Any,
    ) -> None:
        torch.manual_seed(3)
        self.factors = factors
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
        self.hook = None
        if log is not None:
            settings: dict[str, Any] = {"projection_dim": 0, "probe": False, "strict": True}
            self.hook = DiffHook(self.accelerator, log, **(settings | options))
        model = kind().double()
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.5)
        loader = DataLoader(TensorDataset(identified(COUNT).double()), BATCH, shuffle=True)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(model, optimizer, loader)
        self.step = 0
        self.gradients: dict[tuple[int, int], Tensor] = {}
        self.own: dict[tuple[int, int], float] = {}  # losses

    def epochs(self, *numbers: int, twin: bool = False) -> Training:
        for number in numbers:
            torch.manual_seed(number)
            for (clean,) in self.loader:
                self.micro_batch(clean, twin)
        return self

    def micro_batch(self, clean: Tensor, twin: bool) -> None:
        ids = (clean[:, 0, 0, 0] * 16).round().int().tolist()
        noise, timesteps = torch.randn_like(clean), torch.randint(0, 1000, (len(clean),))
        wrong = torch.tensor([3.0 * (sample == BROKEN) for sample in ids]).view(-1, 1, 1, 1)
        batch = (clean, noise, timesteps, noise + wrong)
        if twin:
            found = sample_gradients(self.model, losses, batch)
            self.gradients |= {(self.step, sample): g for sample, g in zip(ids, found, strict=True)}
            with torch.no_grad():
                alone = losses(self.model, batch).tolist()
            self.own |= {(self.step, sample): loss for sample, loss in zip(ids, alone, strict=True)}
        with self.accelerator.accumulate(self.model):
            for part in range(self.parts):
                own = slice(part * BATCH // self.parts, (part + 1) * BATCH // self.parts)
                each = type(self).loss(self.model, tuple(values[own] for values in batch))
                if self.factors is not None:
                    each = each * torch.tensor([self.factors(self.step, sample) for sample in ids[own]])
                self.accelerator.backward(each.mean() / self.parts)
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.step += self.accelerator.sync_gradients

    def end(self) -> dict[str, Tensor]:
        self.accelerator.end_training()
        return {name: value.clone() for name, value in self.model.state_dict().items()}


class Twice(Training):
    loss: Any = staticmethod(twice)


class Halved(Training):
    """Calls a backward for each half of a batch."""

    parts = 2


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11)


def weights_of(log: Path) -> dict[tuple[int, int], float]:
    """(step, sample) → the weight in its row."""
    table = open_log(log).train
    steps, samples, weights = (table[name].tolist() for name in ("step", "sample", "weight"))
    return dict(zip(zip(steps, samples, strict=True), weights, strict=True))


@pytest.fixture
def given() -> Iterator[None]:
    with given_factors(GIVEN):
        yield


ON = Alerts((), (), throttle=True)


@pytest.mark.usefixtures("given")
@pytest.mark.parametrize(
    ("training", "options"),
    [
        (Training, {}),
        (Training, {"accumulation": 3}),
        (Training, {"kind": Recomputed}),
        (Training, {"kind": Reentrant}),
        (Twice, {}),
        (Halved, {}),
    ],
    ids=["plain", "accumulated", "recomputed", "reentrant", "two calls", "halves"],
)
@pytest.mark.parametrize("every", [1, 4])
def test_the_training_is_that_of_a_loss_times_the_factors(
    tmp_path: Path, every: int, training: type[Training], options: dict[str, Any]
) -> None:
    plain = training(None, lambda _, sample: GIVEN.get(sample, 1.0), **options)
    expected = plain.epochs(0, 1, 2, 3).end()
    watched = training(tmp_path / "log", alerts=ON, every=every, **options).epochs(0, 1, 2, 3)
    applied = watched.hook.capture.session.staging.throttling
    found = watched.end()
    assert not applied.missed, applied.missed
    assert_same(found, expected)


@pytest.mark.usefixtures("given")
def test_rows_are_the_samples_own_and_their_weight_holds_the_factor(tmp_path: Path) -> None:
    watched = Training(tmp_path / "log", alerts=ON, every=1, projection_dim="full").epochs(0, 1, twin=True)
    watched.end()
    table = open_log(tmp_path / "log").train
    assert len(table) == 2 * COUNT
    for step, sample, norm, weight, loss, unit in zip(
        *(table[name] for name in ("step", "sample", "grad_norm", "weight", "loss", "projection")),
        strict=True,
    ):
        gradient = watched.gradients[int(step), int(sample)]
        assert norm == pytest.approx(float(gradient.norm()), rel=1e-5)
        assert weight == pytest.approx(GIVEN.get(int(sample), 1.0) / BATCH)
        assert loss == pytest.approx(watched.own[int(step), int(sample)], rel=1e-5)
        assert relative_error(torch.tensor(unit)[None] * norm, gradient[None]) < 1e-3


def test_while_nobody_is_throttled_the_training_is_bit_identical(tmp_path: Path) -> None:
    found = Training(tmp_path / "log", alerts=Alerts(sinks=(), throttle=True), every=2).epochs(0, 1).end()
    expected = Training(None).epochs(0, 1).end()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def factors_of(log: Path) -> Mapping[tuple[int, int], float]:
    """Off the rows."""
    return {at: weight * BATCH for at, weight in weights_of(log).items()}


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor], str]:
    """A run with one sample whose target is wrong: its folder, what was trained, what was said at the end."""
    folder = tmp_path_factory.mktemp("learned")
    training = Training(folder / "log", alerts=Alerts(sinks=(), throttle=True), every=1).epochs(*range(60))
    training.accelerator.save_state(str(folder / "checkpoint"))
    training.epochs(*range(60, 100))
    _, told = training.hook.capture.session.staging.throttling.summary()
    return folder, training.end(), told


def test_a_sample_whose_loss_stays_high_is_throttled_and_others_are_not(learned: Any) -> None:
    folder, trained, told = learned
    factors = factors_of(folder / "log")
    below = {at: factor for at, factor in factors.items() if factor < 1}
    of_broken = [factor for (_, sample), factor in factors.items() if sample == BROKEN]
    assert of_broken[-1] < 0.5
    assert sum(sample != BROKEN for _, sample in below) <= 0.002 * len(factors)
    table = sample_table(folder / "log")
    assert dict(zip(table.sample_ids.tolist(), table.factor.tolist(), strict=True))[BROKEN] == of_broken[-1]
    assert f"in {len({step for step, _ in below})} micro-batches" in told
    plain = Training(None, lambda step, sample: factors[step, sample]).epochs(*range(100))
    assert_same(trained, plain.end())


def test_a_resumed_run_throttles_as_one_that_was_left_alone(learned: Any) -> None:
    folder, trained, _ = learned
    alone = weights_of(folder / "log")
    again = Training(folder / "log", alerts=Alerts(sinks=(), throttle=True), every=1)
    again.accelerator.load_state(str(folder / "checkpoint"))
    again.step = 180
    resumed = again.epochs(*range(60, 100)).end()
    assert weights_of(folder / "log") == alone
    assert_same(resumed, trained)


@pytest.mark.usefixtures("given")
def test_what_cannot_be_throttled_counts_in_full_and_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Refined(Training):
        @staticmethod
        def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
            clean, noise, timesteps, target = batch
            noisy = model(SCHEDULER.add_noise(clean, noise, timesteps), timesteps)[0]
            return (model(noisy, timesteps)[0] - target).square().flatten(1).mean(1)

    watched = Refined(tmp_path / "log", alerts=ON, every=1).epochs(0, 1)
    missed = watched.hook.capture.session.staging.throttling
    found = watched.end()
    assert missed.missed.keys() == {"chained-calls"}
    assert not missed.applied
    assert caplog.text.count("one call of the denoiser feeds another") == 1
    assert_same(found, Refined(None).epochs(0, 1).end())
    assert {1 / BATCH} == set(weights_of(tmp_path / "log").values())


class Weighted(Trainer):
    """Multiplies the losses itself, by the file names of its rows."""

    def note(self, names: list[str], *inputs: Tensor) -> None:
        super().note(names, *inputs)
        self.factors = torch.tensor([FILES.get(name, 1.0) for name in names])

    def losses(self, *inputs: Any) -> Tensor:
        return super().losses(*inputs) * self.factors


FILES = {"photos/a.png": 0.25, "photos/reg/e.png": 0.625}


@pytest.mark.parametrize(
    ("name", "every"), [("sd-scripts", 1), ("sd-scripts", 3), ("SimpleTuner", 3), ("ai-toolkit", 3)]
)
def test_ready_made_batches_of_trainers_are_throttled_by_file_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, every: int
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(COMMANDS, name, COMMANDS[name].replace("--log", f"--throttle --every {every} --log"))
    kind = TRAINERS[name]
    install(kind, tmp_path)
    plain: Any = type("Weighted", (Weighted, kind), {})((0, 1, 2))
    plain.train()
    with given_factors({name_id(file): factor for file, factor in FILES.items()}):
        assert run(name, *kind.arguments((0, 1, 2))) == 0
    for key, value in plain.trained.state_dict().items():
        torch.testing.assert_close(Trainer.last.trained.state_dict()[key], value, rtol=1e-5, atol=1e-6)
    told = read_summary(open_log("runs/mine"))["throttle"]
    assert (told["missed"], told["micro_batches"]) == ({}, len(held(plain.visits)))
    if every == 1:
        assert_rows(Trainer.last.expected())


def assert_rows(expected: list[tuple[int, str, float, float]]) -> None:
    """(step, name, timestep, norm) of a batch-1 loop without the factors."""
    log = open_log("runs/mine")
    columns = [log.train[name].tolist() for name in ("step", "sample", "timestep", "grad_norm")]
    found = sorted((s, log.names()[i], t, n) for s, i, t, n in zip(*columns, strict=True))
    assert [row[:2] for row in found] == [row[:2] for row in expected]
    np.testing.assert_allclose([row[3] for row in found], [row[3] for row in expected], rtol=1e-5)


def held(visits: list[Visit]) -> list[Visit]:
    """Those with a throttled file."""
    return [visit for visit in visits if FILES.keys() & set(visit.names)]


@pytest.mark.usefixtures("given")
def test_an_error_of_ours_leaves_a_sample_unthrottled_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(gradient: Tensor, factors: Tensor) -> Tensor:
        raise MemoryError("injected")

    monkeypatch.setattr("diffhook.capture.loop.session.throttled_pass._times", fails)
    expected = Training(None).epochs(0, 1).end()
    watched = Training(tmp_path / "log", alerts=ON, every=1, strict=False).epochs(0, 1)
    throttling = watched.hook.capture.session.staging.throttling
    assert_same(watched.end(), expected)
    assert throttling.missed["failed"] > 0 == throttling.applied
    assert {*weights_of(tmp_path / "log").values()} <= {np.float32(1 / BATCH).item()}
