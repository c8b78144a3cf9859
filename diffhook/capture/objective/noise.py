"""Noise that a seed brings back."""

from __future__ import annotations

import hashlib
import struct

import torch
from torch import Tensor

_SHARED = -1  # in the place of a sample's id


def noise_seed(grid_seed: int, timestep: float, draw: int, sample: int | None = None) -> int:
    """The seed of one noise draw, in 0 … 2⁶³ − 1.

    A pure function, a hash (BLAKE2b) of its arguments: ranks, devices, batch splits, resumed runs and queries
    asked years later agree on it, and no two timesteps or draws have the same noise.

    Args:
        grid_seed: of the grid.
        timestep: in the scheduler's units.
        draw: number of the draw at this timestep.
        sample: the id of the sample whose own noise it is; None: noise that all samples of a grid share.
    """
    counter = struct.pack("<qdqq", grid_seed, float(timestep), draw, _SHARED if sample is None else sample)
    return int.from_bytes(hashlib.blake2b(counter, digest_size=8).digest(), "little") >> 1


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
