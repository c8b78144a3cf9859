"""A training run for torchrun: python -m torch.distributed.run --nproc-per-node 2 two_processes.py LOG"""

from __future__ import annotations

import sys

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

from diffhook.integrations.accelerate import DiffHook
from tests.runs import TinyDenoiser, denoising_losses, identified


def main(log: str) -> None:
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    DiffHook(accelerator, log, projection_dim="full", strict=True)
    model = TinyDenoiser()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    loader = DataLoader(TensorDataset(identified()), 3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for (clean,) in loader:
        timesteps = (100 * clean[:, 0, 0, 0] * 16 / 4).long()  # of its own for every sample
        loss = denoising_losses(model, (clean, torch.ones_like(clean), timesteps)).mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1])
