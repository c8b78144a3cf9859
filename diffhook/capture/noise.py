"""Noise that a seed brings back."""

from __future__ import annotations

import torch
from torch import Tensor


def noise_bank(seeds: Tensor, like: Tensor, offset: float = 0.0) -> Tensor:
    """Gaussian noise of the samples' shape, one draw a seed; equal seeds give equal noise.

    Drawn on the CPU, so that every device sees the same.

    Args:
        seeds: (B,) int64.
        like: (B, …) whose shape, dtype and device to take.
        offset: noise offset: so much of one further draw per channel is added, constant over the
            rest of the axes.

    Returns:
        (B, …).
    """
    draws = {seed: _draw(seed, like.shape[1:], offset) for seed in set(seeds.tolist())}
    bank = torch.stack([draws[seed] for seed in seeds.tolist()])
    return bank.to(device=like.device, dtype=like.dtype)


def _draw(seed: int, shape: torch.Size, offset: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(shape, generator=generator)
    if offset:
        channels = (shape[0], *(1 for _ in shape[1:]))
        noise += offset * torch.randn(channels, generator=generator)
    return noise
