"""A run that comes back with other numbers of processes, for torchrun.

… world_sizes.py FOLDER STOP KILLED [STEP] trains to STOP, saving every four steps on the main process; the
process KILLED (−1: none) ends itself at its last step. With STEP: goes on from the checkpoint at that step.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from diffhook.integrations.accelerate import DiffHook
from tests.runs import TinyDenoiser, denoising_losses, identified

EVERY = 4
BATCH = 2  # of one process


def main(folder: Path, stop: int, killed: int, begin: int) -> None:
    torch.manual_seed(7)
    accelerator = Accelerator(cpu=True)
    hook = DiffHook(accelerator, folder / "log", strict=True, projection_dim=16)
    model = TinyDenoiser()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), 1e-3))
    if begin:
        accelerator.load_state(str(folder / f"at-{begin}"))
    for step in range(begin, stop):
        ids = BATCH * (step * accelerator.num_processes + accelerator.process_index) + torch.arange(BATCH)
        clean = identified(12)[ids % 12]
        draws = torch.Generator().manual_seed(1000 * step + accelerator.process_index)
        timesteps = torch.randint(0, 1000, (BATCH,), generator=draws)
        batch = (clean, torch.randn(clean.shape, generator=draws), timesteps)
        with hook.step(sample_ids=1000 * begin + ids, timesteps=timesteps):
            accelerator.backward(denoising_losses(model, batch).mean())
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % EVERY == 0 and accelerator.is_main_process:
            accelerator.save_state(str(folder / f"at-{step + 1}"))
        if step + 1 == stop and accelerator.process_index == killed:
            os.kill(os.getpid(), signal.SIGKILL)
    hook.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *(int(word) for word in [*sys.argv[2:], "0"][:3]))
