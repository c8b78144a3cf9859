"""Loops that do what real scripts do: skip, fail, evaluate in between, fetch in their own way."""

from __future__ import annotations

import copy
import logging
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import diffhook
from diffhook.capture.loop.session.thumbnails import ThumbnailTaker
from diffhook.errors import ConfigurationError
from diffhook.integrations.accelerate import DiffHook
from diffhook.integrations.torch import TorchHook
from tests.integrations.watched import Watched
from tests.runs import SCHEDULER, TinyDenoiser, denoising_losses, identified, train

OBJECTIVE = diffhook.DiffusionObjective(SCHEDULER)


class Loop:
    """A loop in pieces, for tests that put them together differently."""

    def __init__(self, log: Path, *, strict: bool = True, loader: Any = None, **options: Any) -> None:
        torch.manual_seed(0)
        self.accelerator = Accelerator(cpu=True)
        self.hook = DiffHook(self.accelerator, log, strict=strict, **options)
        self.plain = TinyDenoiser()
        optimizer = torch.optim.SGD(self.plain.parameters(), 0.01)
        loader = DataLoader(TensorDataset(identified()), 4) if loader is None else loader
        prepared = self.accelerator.prepare(self.plain, optimizer, loader)
        self.model, self.optimizer, self.loader = prepared

    def loss(self, clean: Tensor, timestep: int = 100) -> Tensor:
        timesteps = torch.full((len(clean),), timestep)
        return denoising_losses(self.model, (clean, torch.randn_like(clean), timesteps)).mean()

    def step(self, clean: Tensor, timestep: int = 100) -> None:
        self.accelerator.backward(self.loss(clean, timestep))
        self.optimizer.step()
        self.optimizer.zero_grad()


def samples(log: Path) -> list[int]:
    return diffhook.open_log(log).train["sample"].tolist()


def test_of_a_micro_batch_whose_rows_the_loop_masks_the_others_are_logged(tmp_path: Path) -> None:
    loop = Loop(tmp_path / "log")
    for index, (clean,) in enumerate(loop.loader):
        loop.step(clean[:3] if index == 1 else clean)
    loop.accelerator.end_training()
    assert samples(tmp_path / "log") == [0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11]
    assert len(next(iter(loop.loader))[0]) == 4, "the loop's batches are its own again"


@pytest.mark.parametrize("held", [1, 2])
def test_batches_that_are_fetched_ahead_have_their_own_ids(tmp_path: Path, held: int) -> None:
    loop = Loop(tmp_path / "log")
    waiting: list[Tensor] = []
    for (clean,) in loop.loader:
        waiting.append(clean)
        if len(waiting) > held:
            loop.step(waiting.pop(0))
    for clean in waiting:
        loop.step(clean)
    loop.accelerator.end_training()
    assert samples(tmp_path / "log") == list(range(12))


def test_a_forward_without_a_backward_leaves_no_trace(tmp_path: Path) -> None:
    loop = Loop(tmp_path / "log")
    for index, (clean,) in enumerate(loop.loader):
        if index == 1:
            loop.loss(clean, timestep=999)
            continue
        loop.step(clean, timestep=index)
    loop.accelerator.end_training()
    table = diffhook.open_log(tmp_path / "log").train
    assert table["sample"].tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert table["timestep"].tolist() == [0] * 4 + [2] * 4


def test_gradients_zeroed_without_a_step_moved_nothing(tmp_path: Path) -> None:
    loop = Loop(tmp_path / "log")
    for index, (clean,) in enumerate(loop.loader):
        loop.accelerator.backward(loop.loss(clean))
        if index != 1:  # a guard against bad losses
            loop.optimizer.step()
        loop.optimizer.zero_grad()
    loop.accelerator.end_training()
    table = diffhook.open_log(tmp_path / "log").train
    rates = dict(zip(table["sample"].tolist(), table["lr"].tolist(), strict=True))
    assert [rates[i] for i in (0, 4, 8)] == [np.float32(0.01), 0, np.float32(0.01)]


def test_evaluation_between_steps_and_probes_do_not_disturb(tmp_path: Path) -> None:
    loop = Loop(tmp_path / "log", objective=OBJECTIVE, probe=diffhook.Probe(3, diffhook.Grid(2)))
    evaluation = loop.accelerator.prepare(DataLoader(TensorDataset(identified() + 1), 4))
    for (clean,) in loop.loader:
        loop.step(clean)
        with torch.no_grad():
            for (other,) in evaluation:
                loop.loss(other)
                break
    loop.accelerator.save_state(str(tmp_path / "state"))
    loop.accelerator.end_training()
    assert samples(tmp_path / "log") == list(range(12))
    assert len(diffhook.open_log(tmp_path / "log").probe) == 6


def test_probes_touch_no_random_state_of_any_library(tmp_path: Path) -> None:
    class Flipping(Dataset[Any]):
        def __len__(self) -> int:
            return 12

        def __getitem__(self, index: int) -> tuple[Tensor]:
            draw = random.random() + float(np.random.rand()) + float(torch.rand(()))
            return (identified()[index] + 0.01 * draw,)

    states = []
    for objective in (None, OBJECTIVE):
        random.seed(0)
        np.random.seed(0)
        loop = Loop(tmp_path / str(len(states)), loader=DataLoader(Flipping(), 4), objective=objective)
        for (clean,) in loop.loader:
            loop.step(clean)
        loop.accelerator.end_training()
        states.append((random.random(), np.random.rand(), torch.rand(())))
    assert states[0] == states[1]


class _Batched(TensorDataset):
    """Fetches a whole batch at once, already collated."""

    def __getitems__(self, indices: list[int]) -> tuple[Tensor]:
        return (self.tensors[0][indices],)


class _ByKey(Dataset[Any]):
    """Indexed by (index, size), as bucketing samplers do."""

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor]:
        return (identified()[key[0]],)

    def __len__(self) -> int:
        return 12


def test_a_dataset_that_fetches_whole_batches_keeps_its_form(tmp_path: Path) -> None:
    loop = Loop(tmp_path / "log", loader=DataLoader(_Batched(identified()), 4, collate_fn=lambda b: b))
    for (clean,) in loop.loader:
        loop.step(clean)
    loop.accelerator.end_training()
    assert samples(tmp_path / "log") == list(range(12))


def test_keys_that_are_no_indices_leave_the_loop_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = [[(i, 64) for i in range(start, start + 4)] for start in (0, 4, 8)]
    loop = Loop(tmp_path / "log", loader=DataLoader(_ByKey(), batch_sampler=keys))  # type: ignore[arg-type]
    for (clean,) in loop.loader:
        loop.step(clean)
    loop.accelerator.end_training()
    assert "diffhook captured nothing" in caplog.text


def test_the_dataset_is_the_users_own_to_look_at_and_to_change(tmp_path: Path) -> None:
    data = TensorDataset(identified())
    loop = Loop(tmp_path / "log", loader=DataLoader(data, 4))
    loop.loader.dataset.marked = True
    assert data.marked
    assert torch.equal(loop.loader.dataset[3][0], data[3][0])
    loop.accelerator.end_training()
    assert loop.loader.dataset is data


def test_persistent_workers_give_plain_batches_after_the_end(tmp_path: Path) -> None:
    loader = DataLoader(TensorDataset(identified()), 4, num_workers=1, persistent_workers=True)
    loop = Loop(tmp_path / "log", loader=loader)
    for _ in range(2):
        for (clean,) in loop.loader:
            loop.step(clean)
    loop.hook.close()
    for (clean,) in loop.loader:
        assert clean.shape == (4, 1, 8, 8)
    assert len(samples(tmp_path / "log")) == 24


def test_workers_that_exit_do_not_close_the_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "log", workers=2, epochs=3)
    assert capfd.readouterr().out.count("capture added") == 1


def test_preparing_a_model_twice_is_one_model(tmp_path: Path) -> None:
    loop = Loop(tmp_path / "log")
    loop.accelerator.prepare(loop.model)
    for (clean,) in loop.loader:
        loop.step(clean)
    loop.accelerator.end_training()
    names = [name for name, _ in diffhook.open_log(tmp_path / "log").config["identity"]["parameters"]]
    assert names == [name for name, _ in TinyDenoiser().named_parameters()]


def test_two_optimisers_take_one_step(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    hook = DiffHook(accelerator, tmp_path / "log", strict=True)
    model = TinyDenoiser()
    halves = [torch.optim.SGD(m.parameters(), lr) for m, lr in ((model.time, 0.1), (model.outward, 0.2))]
    loader = DataLoader(TensorDataset(identified()), 4)
    model, first, second, loader = accelerator.prepare(model, *halves, loader)
    for (clean,) in loader:
        timesteps = torch.full((4,), 5)
        accelerator.backward(denoising_losses(model, (clean, clean, timesteps)).mean())
        for optimizer in (first, second):
            optimizer.step()
            optimizer.zero_grad()
    assert hook.step_count == 3
    hook.close()
    assert sorted(set(diffhook.open_log(tmp_path / "log").train["step"])) == [0, 1, 2]


def test_copies_and_pickles_of_the_model_are_free_of_us(tmp_path: Path) -> None:
    loop = Loop(tmp_path / "log")
    for index, (clean,) in enumerate(loop.loader):
        loop.step(clean)
        average = copy.deepcopy(loop.model)
        pickle.loads(pickle.dumps(loop.model))
        if index == 1:
            denoising_losses(average, (clean, clean, torch.full((4,), 5))).mean().backward()
    loop.accelerator.end_training()
    assert samples(tmp_path / "log") == list(range(12))


def test_negative_ids_are_refused(tmp_path: Path) -> None:
    loop = Loop(tmp_path / "log")
    with pytest.raises(ConfigurationError, match=r"\[3, -5\]; expected .* integers in \[0"):
        with loop.hook.step(sample_ids=[3, -5]):
            pass
    loop.hook.close()


def test_manual_accumulation_weighs_rows_as_they_entered_the_step(tmp_path: Path) -> None:
    loop = Loop(tmp_path / "log")
    for index, clean in enumerate(identified().split(4)):
        with loop.hook.step(sample_ids=range(4 * index, 4 * index + 4), loss_scale=1 / 3):
            (loop.loss(clean) / 3).backward()
    loop.optimizer.step()
    loop.hook.close()
    table = diffhook.open_log(tmp_path / "log").train
    np.testing.assert_allclose(table["weight"], 1 / 12, rtol=1e-6)
    assert set(table["step"]) == {0}


def test_a_loop_that_nothing_is_seen_of_is_told_why(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter([(image,) for image in identified()])

    with caplog.at_level(logging.WARNING, "diffhook"):
        loop = Loop(tmp_path / "log", loader=DataLoader(Stream(), 4))
        for (clean,) in loop.loader:
            loop.step(clean)
        loop.accelerator.end_training()
    assert "name the samples with hook.step" in caplog.text


def test_queries_and_alerts_of_a_superseded_run_do_not_count(tmp_path: Path) -> None:
    data = identified()
    data[6, 0, 3, 3] = torch.nan
    train(tmp_path / "log", data=data, epochs=1)
    log = diffhook.open_log(tmp_path / "log")
    diffhook.query(log, (identified(),), "old", OBJECTIVE, model=TinyDenoiser(), grid=diffhook.Grid(1))
    assert list(log.queries) == ["old"]
    assert log.alerts()
    train(tmp_path / "log", epochs=1)
    again = diffhook.open_log(tmp_path / "log")
    assert list(again.queries) == []
    assert again.alerts() == []


def test_prepare_takes_and_gives_what_it_does_without_us(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    DiffHook(accelerator, tmp_path / "log")
    assert accelerator.prepare((1, 2)) == (1, 2)
    assert accelerator.prepare("nothing", 3) == ("nothing", 3)
    accelerator.end_training()


def test_a_hook_that_is_off_or_has_stopped_looks_at_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = TinyDenoiser()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    off = TorchHook(tmp_path / "off", model, optimizer, enabled=False)
    with off.step(sample_ids=[-1, 2]):
        pass
    assert not (tmp_path / "off").exists()
    hook = TorchHook(tmp_path / "log", model, optimizer)
    ran = []
    for ids in ([0, 1], [-1, 2], [-1, 2]):
        with hook.step(sample_ids=ids):
            batch = (torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8), torch.tensor([1, 2]))
            denoising_losses(model, batch).mean().backward()
        optimizer.step()
        ran.append(ids)
    hook.close()
    assert len(ran) == 3, "training goes on"
    assert len([r for r in caplog.records if "left out a micro-batch" in r.message]) == 1
    assert diffhook.open_log(tmp_path / "log").train["sample"].tolist() == [0, 1]


def test_a_thumbnail_that_the_disk_could_not_take_is_taken_at_the_next_visit() -> None:
    taken: list[int] = []

    class Writer:
        full = True

        def thumbnail(self, sample: int, png: bytes) -> bool:
            taken.extend([] if self.full else [sample])
            return not self.full

    taker, writer = ThumbnailTaker(8), Writer()
    for full in (True, False, False):
        writer.full = full
        taker.take(writer, torch.tensor([3, 4]), torch.rand(2, 1, 8, 8))  # type: ignore[arg-type]
    assert taken == [3, 4]


@pytest.mark.parametrize("tokens_first", [True, False])
def test_a_step_in_which_tokens_seemed_to_be_samples_is_left_out_and_told_once(
    tmp_path: Path, tokens_first: bool, caplog: pytest.LogCaptureFixture
) -> None:
    class AsManyTokens(torch.nn.Module):
        """4 tokens, 4 samples."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(8, 8)

        def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
            tokens = sample[:, 0, :4]
            if tokens_first:
                tokens = self.inner(tokens.transpose(0, 1)).transpose(0, 1)
            else:
                tokens = self.inner(tokens)
            return (sample + F.pad(tokens, (0, 0, 0, 4))[:, None],)

    run = train(tmp_path / "log", make_model=AsManyTokens, twin=True, epochs=2)
    events = {(e.step, e.sample): e for e in run.events if e.step > 0 or not tokens_first}
    table = diffhook.open_log(tmp_path / "log").train
    keys = list(zip(table["step"].tolist(), table["sample"].tolist(), strict=True))
    assert set(keys) == events.keys()
    norms = [float(events[key].gradient.norm()) for key in keys]
    np.testing.assert_allclose(table["grad_norm"], norms, rtol=1e-5)
    np.testing.assert_allclose(table["loss"], [events[key].loss for key in keys], rtol=1e-4)
    told = [r for r in caplog.records if "this pass is discarded" in r.message]
    assert len(told) == tokens_first


def test_a_pass_that_the_loop_left_early_may_end_within_a_micro_batch_of_another(tmp_path: Path) -> None:
    loop = Watched(tmp_path / "log").prepare()
    left = iter(loop.accelerator.prepare(DataLoader(TensorDataset(identified()), 3)))
    next(left)
    for (clean,) in loop.loader:
        batch = loop.batch(clean)
        loop.note(batch)
        loss = denoising_losses(loop.model, batch).mean()
        left = None  # its generator is closed here
        loop.accelerator.backward(loss)
        loop.step()
    loop.assert_rows()
