"""Optimisers that do not just step: several learning rates, closures."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import diffhook
from diffhook.integrations.accelerate import DiffHook
from diffhook.integrations.torch import TorchHook
from tests.runs import TinyDenoiser, denoising_losses, identified
from tests.twins import sample_gradients


def _groups(model: nn.Module, *rates: float) -> torch.optim.Optimizer:
    parameters = list(model.parameters())
    split = [parameters[:2], parameters[2:]]
    groups = [{"params": p, "lr": rate} for p, rate in zip(split, rates, strict=True)]
    return torch.optim.SGD(groups, lr=1.0)


def _train(log: Path, optimizer_of: Callable[[nn.Module], torch.optim.Optimizer]) -> Any:
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    DiffHook(accelerator, log, strict=True, projection_dim=0, alerts=())
    model: Any = TinyDenoiser()
    loader: Any = DataLoader(TensorDataset(identified()), 4)
    model, optimizer, loader = accelerator.prepare(model, optimizer_of(model), loader)
    for (clean,) in loader:
        triple = (clean, torch.randn_like(clean), torch.full((4,), 100))
        accelerator.backward(denoising_losses(model, triple).mean())
        optimizer.step()
        optimizer.zero_grad()
    accelerator.end_training()
    return diffhook.open_log(log).train


def test_several_learning_rates_are_told_once_with_the_one_that_rows_have(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = _train(tmp_path / "log", lambda model: _groups(model, 0.02, 0.005))
    assert set(table["lr"]) == {np.float32(0.02)}
    (told,) = [record.getMessage() for record in caplog.records]
    assert "several learning rates (0.005, 0.02)" in told
    assert "the first group's, 0.02, for all parameters" in told


def test_groups_of_one_learning_rate_are_nothing_to_tell(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _train(tmp_path / "log", lambda model: _groups(model, 0.02, 0.02))
    assert not caplog.records


def _with_closures(log: Path, optimizer_of: Callable[[Any], Any], named: bool) -> list[float]:
    """Trains an epoch by closures; returns the norms that a loop over samples finds before each step."""
    torch.manual_seed(0)
    model: Any = TinyDenoiser()
    plain, loader = optimizer_of(model.parameters()), DataLoader(TensorDataset(identified()), 4)
    accelerator = Accelerator(cpu=True)
    options: Any = {"strict": True, "projection_dim": 0, "alerts": ()}
    hook: Any = TorchHook(log, model, plain, **options) if named else DiffHook(accelerator, log, **options)
    model, optimizer, loader = (model, plain, loader) if named else accelerator.prepare(model, plain, loader)
    norms: list[float] = []
    for number, (clean,) in enumerate(loader):
        triple = (clean, torch.randn_like(clean), torch.full((4,), 100))
        norms += sample_gradients(model, denoising_losses, triple).norm(dim=1).tolist()

        def closure(triple: Any = triple) -> Any:
            optimizer.zero_grad()
            loss = denoising_losses(model, triple).mean()
            if named:
                loss.backward()
            else:
                accelerator.backward(loss)
            return loss

        ids = range(4 * number, 4 * number + 4)
        with hook.step(sample_ids=ids) if named else nullcontext():
            optimizer.step(closure)
    hook.close()
    return norms


CLOSURES: dict[str, Callable[[Any], Any]] = {
    "called once": lambda p: torch.optim.SGD(p, 0.01),
    "called again": lambda p: torch.optim.LBFGS(p, 0.01, max_iter=3),
}


@pytest.mark.parametrize("named", [False, True], ids=["accelerate", "named"])
@pytest.mark.parametrize("kind", CLOSURES)
def test_a_closures_rows_are_those_of_its_first_call_with_the_steps_learning_rate(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, named: bool
) -> None:
    norms = _with_closures(tmp_path / "log", CLOSURES[kind], named)
    table = diffhook.open_log(tmp_path / "log").train
    assert table["sample"].tolist() == list(range(12))
    assert set(table["lr"]) == {np.float32(0.01)}
    assert table["step"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    np.testing.assert_allclose(table["grad_norm"], norms, rtol=1e-4)
    assert ("calls its closure again" in caplog.text) == (kind == "called again")
