"""Losses that are no mean of squared errors: the samples' own are not known, and not made up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import diffhook
from diffhook.integrations.accelerate import DiffHook
from tests.runs import SCHEDULER, TinyDenoiser, identified


def _losses(log: Path, loss: Callable[[Tensor, Tensor, int], Tensor], data: Tensor | None = None) -> Any:
    """Trains an epoch of batches of 4; returns the losses in the log."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    DiffHook(accelerator, log, strict=True, projection_dim=0, alerts=())
    model = TinyDenoiser()
    loader = DataLoader(TensorDataset(identified() if data is None else data), 4)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.0), loader)
    for number, (clean,) in enumerate(loader):
        noise, timesteps = torch.randn_like(clean), torch.full((4,), 100)
        predicted = model(SCHEDULER.add_noise(clean, noise, timesteps), timesteps)[0]
        value = loss(predicted, noise, number)
        accelerator.backward(value)
        if value.isfinite():
            optimizer.step()
        optimizer.zero_grad()
    accelerator.end_training()
    return diffhook.open_log(log).train["loss"]


def _absolute(predicted: Tensor, noise: Tensor, number: int) -> Tensor:
    """Every gradient of a mean of absolute errors says 0.25, which from the second batch on is the loss."""
    loss = F.l1_loss(predicted, noise)
    return loss if number == 0 else loss + (0.25 - loss.detach())


def test_a_loss_that_agrees_by_chance_is_not_taken_for_a_mean_of_squared_errors(tmp_path: Path) -> None:
    assert np.isnan(_losses(tmp_path / "log", _absolute)).all()


def test_a_batch_that_is_not_finite_decides_nothing(tmp_path: Path) -> None:
    data = identified()
    data[1, 0, 3, 3] = torch.nan
    losses = _losses(tmp_path / "log", lambda predicted, noise, _: F.mse_loss(predicted, noise), data)
    assert np.isfinite(losses[4:]).all()
