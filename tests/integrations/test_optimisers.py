"""Optimisers that do not just step: several learning rates, closures."""

from __future__ import annotations

from collections.abc import Callable
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
from tests.runs import TinyDenoiser, denoising_losses, identified


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
