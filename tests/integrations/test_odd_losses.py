"""Losses that are no mean of squared errors: the samples' own are not known, and not made up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import diffhook
from diffhook.cli.info import describe
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
    """Every gradient of a mean of absolute errors says 0.25, which from the second batch on is the loss; it
    is written so that its graph does not tell what it is."""
    error = predicted - noise
    loss = (error * error.sign()).mean()
    return loss if number == 0 else loss + (0.25 - loss.detach())


def test_a_loss_that_agrees_by_chance_is_not_taken_for_a_mean_of_squared_errors(tmp_path: Path) -> None:
    assert np.isnan(_losses(tmp_path / "log", _absolute)).all()


def test_rows_without_a_loss_are_told_once_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    assert np.isnan(
        _losses(tmp_path / "log", lambda predicted, noise, _: (predicted - noise).pow(4).mean())
    ).all()
    assert caplog.text.count("samples' own losses are not known") == 1
    assert "12 rows without the sample's own loss" in capsys.readouterr().out
    assert describe(diffhook.open_log(tmp_path / "log"))["rows without a loss"] == 12


def test_known_losses_are_not_spoken_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    _losses(tmp_path / "log", lambda predicted, noise, _: F.l1_loss(predicted, noise))
    assert "own loss" not in caplog.text + capsys.readouterr().out
    assert describe(diffhook.open_log(tmp_path / "log"))["rows without a loss"] == 0


def test_a_batch_that_is_not_finite_decides_nothing(tmp_path: Path) -> None:
    data = identified()
    data[1, 0, 3, 3] = torch.nan
    losses = _losses(tmp_path / "log", lambda predicted, noise, _: F.mse_loss(predicted, noise), data)
    assert np.isfinite(losses[4:]).all()


def _train_on_pairs(log: Path, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Each item has two pictures, which the loop puts one batch after the other."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    DiffHook(accelerator, log, strict=True, projection_dim=0, alerts=(), probe=False)
    model, images = TinyDenoiser(), identified()
    pairs = TensorDataset(torch.cat([images, images.flip(0)], 1))
    loader = DataLoader(pairs, 4, drop_last=True)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 1e-3), loader)
    for (both,) in loader:
        clean = torch.cat(both.chunk(2, dim=1))
        noise, timesteps = torch.randn_like(clean), torch.full((8,), 100)
        predicted = model(SCHEDULER.add_noise(clean, noise, timesteps), timesteps)[0]
        accelerator.backward(loss(predicted, noise))
        optimizer.step()
        optimizer.zero_grad()
    accelerator.end_training()


def _preference(predicted: Tensor, noise: Tensor) -> Tensor:
    """Diffusion-DPO's, without a reference."""
    chosen, rejected = (predicted - noise).square().flatten(1).mean(1).chunk(2)
    return -F.logsigmoid(rejected - chosen).mean()


def test_a_loss_that_couples_a_samples_rows_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _train_on_pairs(tmp_path / "log", _preference)
    told = [each.message for each in caplog.records if "couples a sample's rows" in each.message]
    assert len(told) == 1
    assert told[0].startswith("each sample gives the model 2 rows")


def test_losses_of_a_samples_rows_that_add_up_are_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _train_on_pairs(tmp_path / "log", F.mse_loss)
    assert not [each for each in caplog.records if "couples a sample's rows" in each.message]
    assert np.isfinite(diffhook.open_log(tmp_path / "log").train["loss"]).all()
