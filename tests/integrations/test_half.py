"""Half precision with a scaled loss: the scale is undone, and steps that it skips move nothing.

Accelerate allows float16 on GPUs only; on a CPU it is given what it would make there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator, GradScalerKwargs
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import diffhook
from diffhook.integrations.accelerate import DiffHook
from diffhook.integrations.torch import TorchHook
from tests.devices import DEVICE
from tests.runs import TinyDenoiser, denoising_losses, identified
from tests.twins import rows

DEVICES = ["cpu", pytest.param(DEVICE, marks=pytest.mark.gpu, id="gpu")]
OPTIMISERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.01),
    "fused": lambda p: torch.optim.AdamW(p, 0.01, fused=True),  # skips within its own step
}
COUNT, BATCH = 12, 4
SCALER: dict[str, Any] = {  # the first step overflows, and later ones have other scales
    "init_scale": 2.0**34,
    "backoff_factor": 2.0**-24,
    "growth_factor": 2.0,
    "growth_interval": 1,
}


@pytest.fixture(autouse=True)
def _own_state() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def _batch(clean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    noise, timesteps = torch.randn(clean.shape), torch.randint(0, 1000, (len(clean),))
    return clean, noise.to(clean.device), timesteps.to(clean.device)


class Truth:
    """What the batch-1 loop says of every sample, at the scale of its step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.gradients: list[Tensor] = []

    def add(self, model: nn.Module, batch: Any, scale: float) -> None:
        twin = copy.deepcopy(model)
        for sample in range(len(batch[0])):
            with torch.autocast(batch[0].device.type, torch.float16):
                loss = denoising_losses(twin, rows(batch, slice(sample, sample + 1))).sum()
            gradient = torch.autograd.grad(loss * scale, list(twin.parameters()))
            self.losses.append(loss.item())
            self.gradients.append(torch.cat([g.flatten().double() / scale for g in gradient]).cpu())

    def compare(self, log: Path) -> None:
        """Rows are in the order of training; the first batch's step is skipped."""
        table = diffhook.open_log(log).train
        assert table["sample"].tolist() == list(range(COUNT))
        assert table["step"].tolist() == [0] * 2 * BATCH + [1] * BATCH, "a skipped step is none"
        np.testing.assert_allclose(table["lr"], [0] * BATCH + [0.01] * 2 * BATCH, rtol=1e-6)
        np.testing.assert_allclose(table["weight"], 1 / BATCH, rtol=1e-6)
        assert not np.isfinite(table["grad_norm"][:BATCH]).any(), "the overflow is seen"
        for row, gradient in list(enumerate(self.gradients))[BATCH:]:
            norm = float(gradient.norm())
            np.testing.assert_allclose(table["grad_norm"][row], norm, rtol=0.02)
            assert np.linalg.norm(table["projection"][row] - (gradient / norm).numpy()) < 0.05


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", OPTIMISERS)
def test_a_plain_loops_scaler_is_undone(tmp_path: Path, kind: str, device: str) -> None:
    torch.manual_seed(0)
    model = TinyDenoiser().to(device)
    optimizer, scaler = OPTIMISERS[kind](model.parameters()), torch.amp.GradScaler(device, **SCALER)
    hook = TorchHook(tmp_path / "log", model, optimizer, scaler, strict=True, projection_dim="full")
    truth = Truth()
    for ids in torch.arange(COUNT).split(BATCH):
        batch = _batch(identified()[ids].to(device))
        truth.add(model, batch, scaler.get_scale())
        with hook.step(sample_ids=ids):
            with torch.autocast(device, torch.float16):
                loss = denoising_losses(model, batch).mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
    assert hook.step_count == 2
    hook.close()
    truth.compare(tmp_path / "log")


def _half(device: str) -> Accelerator:
    if device == "cuda":
        return Accelerator(mixed_precision="fp16", kwargs_handlers=[GradScalerKwargs(**SCALER)])
    accelerator = Accelerator(cpu=True)
    accelerator.state._mixed_precision = "fp16"
    accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler(device, **SCALER)
    return accelerator


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", OPTIMISERS)
def test_accelerates_scaler_is_undone(tmp_path: Path, kind: str, device: str) -> None:
    torch.manual_seed(0)
    accelerator = _half(device)
    hook = DiffHook(accelerator, tmp_path / "log", strict=True, projection_dim="full")
    plain = TinyDenoiser()
    optimizer = OPTIMISERS[kind](plain.parameters())
    loader = DataLoader(TensorDataset(identified()), BATCH)
    model, optimizer, loader = accelerator.prepare(plain, optimizer, loader)
    truth = Truth()
    for (clean,) in loader:
        batch = _batch(clean)
        truth.add(plain, batch, accelerator.scaler.get_scale())
        accelerator.backward(denoising_losses(model, batch).mean())
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert hook.step_count == 2
    accelerator.end_training()
    truth.compare(tmp_path / "log")
    losses = diffhook.open_log(tmp_path / "log").train["loss"][BATCH:]
    np.testing.assert_allclose(losses, truth.losses[BATCH:], rtol=0.02)
