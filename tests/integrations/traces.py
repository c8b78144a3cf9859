"""A loop, and what of ours hangs on it."""

from __future__ import annotations

import threading
from typing import Any

import torch
from accelerate import Accelerator, data_loader
from torch.optim import optimizer
from torch.utils.data import DataLoader, TensorDataset

from tests.runs import TinyDenoiser, denoising_losses, identified


class Traces:
    """What there is of us on an accelerator, a model, an optimiser, and anywhere."""

    def __init__(self) -> None:
        self.accelerator = Accelerator(cpu=True)
        self._plain = Accelerator(cpu=True)
        self.model = TinyDenoiser()
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1)
        self.loader = DataLoader(TensorDataset(identified()), 4)
        self._before = self._look()

    def _look(self) -> dict[str, Any]:
        loaders = (data_loader.DataLoaderShard, data_loader.DataLoaderDispatcher, data_loader.SkipDataLoader)
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        modules = self.model.modules()
        names = [thread.name for thread in threading.enumerate()]  # fsync: a pool that writes share
        return {
            "classes": [kind.__iter__ for kind in loaders],
            "accelerator": sorted(vars(self.accelerator)),
            "checkpoints": len(self.accelerator._save_model_state_pre_hook),
            "resuming": len(self.accelerator._load_model_state_pre_hook),
            "modules": [hook for m in modules for kind in kinds for hook in getattr(m, kind).values()],
            "parameters": [p.requires_grad for p in self.model.parameters()],
            "optimizer": sorted(vars(self.optimizer)),
            "steps": list(optimizer._global_optimizer_post_hooks.values()),
            "threads": sorted(name for name in names if name.startswith("diffhook-") and "fsync" not in name),
        }

    def assert_none(self) -> None:
        assert self._look() == self._before

    def assert_some(self) -> None:
        found = self._look()
        assert all(found[name] != self._before[name] for name in ("classes", "modules", "steps", "threads"))

    def prepare(self) -> None:
        """Once: the wrappers of accelerate are to stay."""
        self.model, _, _ = self.accelerator.prepare(self.model, self.optimizer, self.loader)

    def loop(self, *, fail_at: int | None = None) -> None:
        for index, (clean,) in enumerate(self.accelerator._dataloaders[-1]):
            batch = (clean, torch.randn_like(clean), torch.zeros(4).long())
            loss = denoising_losses(self.model, batch).mean()
            if index == fail_at:
                raise KeyError("the loop's own")
            self.accelerator.backward(loss)
            self.accelerator._optimizers[-1].step()
            self.accelerator._optimizers[-1].zero_grad()
