"""A loop in pieces for tests, whose rows are compared with a batch-1 loop in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import diffhook
from diffhook.integrations.accelerate import DiffHook
from tests.runs import TinyDenoiser, denoising_losses, identified
from tests.twins import sample_gradients

Losses = Callable[[nn.Module, Any], Tensor]


class Watched:
    """A loop in pieces whose rows are compared with a batch-1 loop in float64."""

    def __init__(self, log: Path | None, model: nn.Module | None = None, **options: Any) -> None:
        torch.manual_seed(0)
        self.log = log
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=options.pop("accumulation", 1))
        self.model: Any = TinyDenoiser() if model is None else model
        self.optimizer: Any = torch.optim.SGD(self.model.parameters(), 0.01)
        self.loader: Any = DataLoader(TensorDataset(identified()), 4)
        if log is not None:
            self.hook = DiffHook(self.accelerator, log, projection_dim=0, alerts=(), **options)
        self.expected: dict[tuple[int, int], float] = {}  # (step, sample) → norm
        self.steps = 0

    def prepare(self, *, optimizer: bool = True) -> Watched:
        given = [self.model, self.loader] + ([self.optimizer] if optimizer else [])
        prepared = self.accelerator.prepare(*given)
        self.model, self.loader = prepared[:2]
        if optimizer:
            self.optimizer = prepared[2]
        return self

    def batch(self, clean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return clean, torch.randn_like(clean), torch.randint(0, 1000, (len(clean),))

    def note(self, batch: Any, losses: Losses = denoising_losses) -> None:
        self._expect(batch[0], sample_gradients(self.accelerator.unwrap_model(self.model), losses, batch))

    def note_losses(self, clean: Tensor, losses: Tensor, parameters: list[nn.Parameter]) -> None:
        """As :meth:`note`, of losses at hand, where another model runs the trained one."""
        shares = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
        self._expect(clean, [torch.cat([share.flatten() for share in each]) for each in shares])

    def _expect(self, clean: Tensor, gradients: Any) -> None:
        for image, gradient in zip(clean, gradients, strict=True):
            self.expected[self.steps, round(float(image[0, 0, 0]) * 16)] = float(gradient.norm())

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1

    def assert_rows(self) -> Any:
        self.accelerator.end_training()
        assert self.log is not None
        table = diffhook.open_log(self.log).train
        keys = list(zip(table["step"].tolist(), table["sample"].tolist(), strict=True))
        assert sorted(keys) == sorted(self.expected)
        np.testing.assert_allclose(table["grad_norm"], [self.expected[key] for key in keys], rtol=1e-5)
        return table

    def epoch(self) -> Watched:
        """A plain one."""
        for (clean,) in self.loader:
            batch = self.batch(clean)
            self.note(batch)
            self.accelerator.backward(denoising_losses(self.model, batch).mean())
            self.step()
        return self
