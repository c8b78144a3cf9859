"""A training on a GPU is the same with and without us, and waits for the GPU where it did before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
from tests.devices import DEVICE
from tests.models import unet
from tests.runs import SCHEDULER, denoising_losses
from tests.twins import sample_gradients

pytestmark = pytest.mark.gpu

STEPS, EVERY = 40, 4


@contextmanager
def _no_waits(wanted: bool) -> Iterator[None]:
    """torch raises where the host would wait for the GPU."""
    if not wanted or DEVICE != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _train(log: Path | None, *, watch_waits: bool = False, **options: Any) -> tuple[nn.Module, list[float]]:
    """The model after its training, and the norms of the last batch by a batch-1 loop.

    Args:
        watch_waits: from the middle on, in steps that are not captured and before the optimiser's in those
            that are.
    """
    torch.manual_seed(0)
    accelerator, model = Accelerator(cpu=DEVICE == "cpu"), unet().model
    if log is not None:
        DiffHook(accelerator, log, strict=True, **options)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    loader = DataLoader(TensorDataset(torch.randn(4 * STEPS, 1, 16, 16)), 4, pin_memory=DEVICE == "cuda")
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    norms: list[float] = []
    for step, (clean,) in enumerate(loader):
        noise = torch.randn_like(clean)
        timesteps = torch.randint(0, 1000, (4,), device=clean.device)
        noisy = SCHEDULER.add_noise(clean, noise, timesteps)  # its own table is moved there: that waits
        if step % EVERY == 0:
            batch = (clean, noise, timesteps)
            norms = sample_gradients(model, denoising_losses, batch).norm(dim=1).tolist()
        with _no_waits(watch_waits and step > STEPS // 2):
            predicted = model(noisy, timesteps, return_dict=False)[0]
            accelerator.backward((predicted - noise).square().mean())
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        with _no_waits(watch_waits and step > STEPS // 2 and step % EVERY != 0):
            optimizer.step()
            optimizer.zero_grad()
    accelerator.end_training()
    return model, norms


def test_training_is_bit_identical_and_rows_are_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        plain, _ = _train(None)
        watched, norms = _train(tmp_path / "log", every=EVERY, snapshot_every=10)
    finally:
        torch.use_deterministic_algorithms(False)
    for before, after in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(before, after)
    rows = diffhook.open_log(tmp_path / "log").train
    assert len(rows) == STEPS // EVERY * 4
    np.testing.assert_allclose(rows["grad_norm"][-4:], norms, rtol=1e-5)


def test_nobody_waits_before_the_optimiser_step_is_under_way(tmp_path: Path) -> None:
    _train(tmp_path / "log", watch_waits=True, every=EVERY)
    assert len(diffhook.open_log(tmp_path / "log").train) == STEPS // EVERY * 4
