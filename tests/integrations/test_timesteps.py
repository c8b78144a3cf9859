"""Timesteps as loops hand them to their models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import diffhook
from diffhook.capture.loop.session.session import CaptureSession
from diffhook.capture.loop.watches.call_inspection import find_timesteps
from diffhook.errors import CaptureError
from diffhook.integrations.accelerate import DiffHook
from tests.integrations.watched import Watched
from tests.runs import TinyDenoiser, identified


class Broadcasting(TinyDenoiser):
    """Takes timesteps of any shape that has a number for each row, or one for all."""

    def forward(self, sample: Tensor, timestep: Any, return_dict: bool = True) -> Any:
        return super().forward(sample, torch.as_tensor(timestep).flatten().expand(len(sample)))


class TimeFirst(nn.Module):
    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return x


class Masked(nn.Module):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return input_ids


class Encoder(nn.Module):
    """Stands for a text encoder that is trained alone, with gradient checkpointing."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Linear(1, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        found: Tensor = checkpoint(self.scale, tokens, use_reentrant=False)
        return found


def _train(log: Path, shaped: Callable[[Tensor], Any], call: Any = None, **options: Any) -> list[float]:
    """Trains an epoch; returns the timesteps of the rows, as drawn."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    DiffHook(accelerator, log, strict=True, projection_dim=0, alerts=(), **options)
    model = Broadcasting()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    loader = DataLoader(TensorDataset(identified()), 4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    drawn: list[float] = []
    for (clean,) in loader:
        told = shaped(torch.randint(1, 1000, (4,)).float())
        predicted = (model(clean, told) if call is None else call(model, clean, told))[0]
        accelerator.backward((predicted - clean).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        drawn += torch.as_tensor(told).flatten().expand(4).tolist()
    accelerator.end_training()
    return drawn


SHAPES: dict[str, Callable[[Tensor], Any]] = {
    "(B,)": lambda t: t,
    "(B, 1)": lambda t: t[:, None],
    "(B, 1, 1, 1)": lambda t: t[:, None, None, None],
    "(1,)": lambda t: t[:1],
    "()": lambda t: t[0],
    "a number": lambda t: float(t[0]),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("keywords", [False, True], ids=["positional", "keywords, the timestep first"])
def test_a_number_for_each_row_or_one_for_all_is_read(tmp_path: Path, shape: str, keywords: bool) -> None:
    call = (lambda model, clean, told: model(timestep=told, sample=clean)) if keywords else None
    drawn = _train(tmp_path / "log", SHAPES[shape], call)
    assert diffhook.open_log(tmp_path / "log").train["timestep"].tolist() == drawn


def test_the_batch_is_not_mistaken_where_the_time_comes_first() -> None:
    found = find_timesteps(TimeFirst(), (torch.ones(1), torch.ones(3, 2)), {})
    assert found is not None
    assert found.values.tolist() == [1, 1, 1]


def test_a_timestep_for_each_token_is_told_by_its_shape(tmp_path: Path) -> None:
    with pytest.raises(
        CaptureError, match=r"timestep has shape \(4, 3\); expected a number for each of the 4 rows"
    ):
        find_timesteps(Broadcasting(), (torch.ones(4, 1, 8, 8),), {"timestep": torch.ones(4, 3)})
    masked = (torch.ones(4, 3), torch.ones(4, 3))
    assert find_timesteps(Masked(), masked, {}) is None, "an attention mask is no timestep"


class Inversion:
    """Textual inversion: only the text encoder is prepared, the frozen denoiser is called by itself."""

    def __init__(
        self, log: Path | None, denoiser: Callable[[], nn.Module], keyword: bool = False, strict: bool = True
    ) -> None:
        torch.manual_seed(0)
        self.accelerator = Accelerator(cpu=True)
        if log is not None:
            DiffHook(self.accelerator, log, strict=strict, projection_dim=0, alerts=())
        self.denoiser, self.keyword = denoiser().requires_grad_(False), keyword
        encoder: Any = Encoder()
        optimizer = torch.optim.SGD(encoder.parameters(), 0.1)
        loader = DataLoader(TensorDataset(identified()), 4)
        self.encoder, self.optimizer, self.loader = self.accelerator.prepare(encoder, optimizer, loader)
        self.losses: list[float] = []

    def run(self) -> Inversion:
        for number, (clean,) in enumerate(self.loader):
            timesteps, noise = torch.arange(4) + 4 * number, torch.randn_like(clean)
            with torch.no_grad():
                self.denoiser(clean, timesteps + 500)  # a teacher's answer, say
            text = self.encoder(torch.ones(4, 1))[:, :, None, None]
            told = {"timestep": timesteps} if self.keyword else {}
            predicted = self.denoiser(clean * text, *(() if told else (timesteps,)), **told)[0]
            losses = (predicted - noise).square().flatten(1).mean(1)
            self.losses += losses.tolist()
            self.accelerator.backward(losses.mean())
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.accelerator.end_training()
        return self


@pytest.mark.parametrize("keyword", [False, True], ids=["positional", "keyword"])
def test_timesteps_are_read_off_the_frozen_denoiser_that_another_model_is_trained_through(
    tmp_path: Path, keyword: bool
) -> None:
    run = Inversion(tmp_path / "log", TinyDenoiser, keyword).run()
    table = diffhook.open_log(tmp_path / "log").train
    assert table["sample"].tolist() == table["timestep"].tolist() == list(range(12))
    np.testing.assert_allclose(table["loss"], run.losses, rtol=1e-4)
    plain = Inversion(None, TinyDenoiser, keyword).run()
    assert torch.equal(run.encoder.scale.weight, plain.encoder.scale.weight)
    assert not run.denoiser._forward_pre_hooks
    assert not run.denoiser._forward_hooks
    assert not torch.nn.modules.module._global_forward_pre_hooks


def test_an_error_of_ours_between_forward_and_backward_leaves_checkpointed_training_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("not today")

    plain = Inversion(None, TinyDenoiser).run()
    with monkeypatch.context() as failing:
        failing.setattr(CaptureSession, "_denoiser_called", broken)
        failing.setattr(CaptureSession, "_output_seen", broken)
        run = Inversion(tmp_path / "log", TinyDenoiser, strict=False).run()
    assert torch.equal(run.encoder.scale.weight, plain.encoder.scale.weight)
    assert run.losses == plain.losses
    run.encoder(torch.ones(4, 1))
    assert not run.encoder.scale._forward_hooks


def test_where_no_model_is_called_with_timesteps_they_are_to_be_named(tmp_path: Path) -> None:
    class Nameless(nn.Module):
        def forward(self, *both: Any) -> Any:
            return both[:1]

    with pytest.raises(CaptureError, match="another model is trained through a frozen denoiser"):
        Inversion(tmp_path / "log", Nameless).run()
    assert not torch.nn.modules.module._global_forward_pre_hooks


def test_training_rows_and_probes_have_the_schedulers_units(tmp_path: Path) -> None:
    """Flux's model is told t/1000; what a loop names itself is in the scheduler's units already."""
    objective = diffhook.DiffusionObjective(FlowMatchEulerDiscreteScheduler(), timestep_scale=1 / 1000)
    probe = diffhook.Probe(2, diffhook.Grid(4))
    log = tmp_path / "log"
    drawn = _train(log, lambda t: t / 1000, objective=objective, probe=probe)
    found = diffhook.open_log(log)
    np.testing.assert_allclose(found.train["timestep"], 1000 * np.array(drawn), rtol=1e-6)
    assert found.probe["timestep"].max() > 500
    accelerator = Accelerator(cpu=True)
    hook = DiffHook(accelerator, tmp_path / "named", strict=True, objective=objective, probe=probe)
    model, loader = accelerator.prepare(TinyDenoiser(), DataLoader(TensorDataset(identified()), 2))
    for clean, *_ in loader:
        with hook.step(sample_ids=[4, 5], timesteps=[700, 20]):
            accelerator.backward(model(clean, torch.tensor([0.7, 0.02]))[0].square().mean())
        break
    accelerator.end_training()
    assert diffhook.open_log(tmp_path / "named").train["timestep"].tolist() == [700, 20]


class Embedding(nn.Module):
    """Told a multiple of what the model was told, as Flux does it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)

    def forward(self, timestep: Tensor) -> Tensor:
        return self.linear(timestep[:, None])[:, :, None, None]


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = Embedding()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: Tensor, noise_labels: Tensor) -> Tensor:
        return self.conv(x + self.embedding(timestep=noise_labels * 1000))


class Preconditioned(nn.Module):
    """Told sigma, of which it tells its network the logarithm."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Inner()

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return x + self.model(x, sigma.log() / 4)


@pytest.mark.parametrize("fails", [False, True])
def test_rows_have_the_timestep_that_the_outermost_module_is_told(tmp_path: Path, fails: bool) -> None:
    """Also where a call that failed was tried again."""
    model = Preconditioned()
    loop = Watched(tmp_path / "log", model).prepare()
    drawn: list[float] = []
    for number, (clean,) in enumerate(loop.loader):
        if fails and number == 1:
            with pytest.raises(RuntimeError):
                loop.model(clean[..., 0], torch.full((4,), 7.0))
        sigma = torch.randint(1, 80, (4,)).float()
        loop.accelerator.backward((loop.model(clean, sigma) - clean).square().mean())
        loop.step()
        drawn += sigma.tolist()
    loop.accelerator.end_training()
    assert diffhook.open_log(tmp_path / "log").train["timestep"].tolist() == drawn
