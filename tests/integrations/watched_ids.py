"""A watched loop whose rows' ids are compared with the pictures that it trains on."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

import diffhook
from diffhook.integrations.accelerate import DiffHook
from tests.runs import TinyDenoiser, denoising_losses


class Watched:
    """A watched loop that notes which pictures it trains on: by their first pixel, which tells the index."""

    def __init__(self, log: Path, **options: Any) -> None:
        torch.manual_seed(0)
        random.seed(0)
        self.accelerator = Accelerator(cpu=True)
        self.hook = DiffHook(self.accelerator, log, projection_dim=0, strict=True, alerts=(), **options)
        model = TinyDenoiser()
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.log = log
        self.seen: list[int] = []

    def prepare(self, *loaders: Any) -> Any:
        return self.accelerator.prepare(*loaders)

    def epoch(self, loader: Any, take: Callable[[Any], Tensor] = lambda batch: batch["image"]) -> Watched:
        for batch in loader:
            self.step(take(batch))
        return self

    def step(self, clean: Tensor) -> None:
        self.seen += (clean[:, 0, 0, 0] * 16).round().int().tolist()
        triple = (clean, torch.randn_like(clean), torch.full((len(clean),), 100))
        self.accelerator.backward(denoising_losses(self.model, triple).mean())
        self.optimizer.step()
        self.optimizer.zero_grad()

    def end(self) -> list[Any]:
        """The samples of the rows, by name where they have one."""
        self.accelerator.end_training()
        log = diffhook.open_log(self.log)
        names = log.names()
        return [names.get(sample, sample) for sample in log.train["sample"].tolist()]
