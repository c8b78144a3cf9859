"""A run of two processes in several sittings, for torchrun: … two_sittings.py FOLDER [STEP].

Without STEP: a run that is left alone, logged to FOLDER/whole, and one that saves twice and is
killed, to FOLDER/log. With STEP: the second one goes on from its checkpoint at that step.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader, TensorDataset

from diffhook.integrations.accelerate import DiffHook
from tests.runs import TinyDenoiser, denoising_losses, identified

STEPS = 6
SAVED = (2, 4)
KILLED = 5
BATCH = 2  # of one process


class Sitting:
    def __init__(self, folder: Path, log: str) -> None:
        self.folder = folder
        torch.manual_seed(7)
        configuration = DataLoaderConfiguration(use_seedable_sampler=True)
        self.accelerator = Accelerator(cpu=True, dataloader_config=configuration)
        self.hook = DiffHook(self.accelerator, folder / log, strict=True, projection_dim=16)
        model = TinyDenoiser()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        loader = DataLoader(TensorDataset(identified(2 * BATCH * STEPS)), BATCH, shuffle=True)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(model, optimizer, loader)

    def train(self, *, begin: int = 0, saving: bool = False, resume: Path | None = None) -> None:
        if resume is not None:
            self.accelerator.load_state(str(resume))
        for step, (clean,) in enumerate(skip_first_batches(self.loader, begin), begin):
            draws = torch.Generator().manual_seed(10 * step + self.accelerator.process_index)
            noise = torch.randn(clean.shape, generator=draws)
            timesteps = torch.randint(0, 1000, (len(clean),), generator=draws)
            self.accelerator.backward(denoising_losses(self.model, (clean, noise, timesteps)).mean())
            self.optimizer.step()
            self.optimizer.zero_grad()
            if saving:
                self._after(step + 1)
        self.hook.close()

    def _after(self, steps: int) -> None:
        """At first as accelerate's own examples save, on every process; then as scripts do, on one."""
        if steps == SAVED[0] or (steps == SAVED[1] and self.accelerator.is_main_process):
            self.accelerator.save_state(str(self.folder / f"at-{steps}"))
        if steps == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path, begin: int | None) -> None:
    if begin is None:
        Sitting(folder, "whole").train()
        Sitting(folder, "log").train(saving=True)
    else:
        Sitting(folder, "log").train(begin=begin, resume=folder / f"at-{begin}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None)
