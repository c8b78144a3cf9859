"""Whether numbers may be standard Gaussian noise."""

from __future__ import annotations

import math

from torch import Tensor

_DEVIATIONS = 6.0


class Whiteness:
    """Mean, variance, kurtosis and neighbours of all that was added; of variances, each row's, too.

    A constant shift of each channel, as noise offset adds, is left out of it.
    """

    def __init__(self) -> None:
        self._count = self._lost = self._pairs = 0
        self._squares = self._fourths = self._products = 0.0
        self._rows = True

    def add(self, noise: Tensor) -> bool:
        """(B, …) further rows. Returns whether they may be noise, by themselves."""
        own = Whiteness()
        own._measure(noise.float())
        self._count += own._count
        self._lost += own._lost
        self._pairs += own._pairs
        self._squares += own._squares
        self._fourths += own._fourths
        self._products += own._products
        self._rows = self._rows and own._rows
        return own.holds

    def _measure(self, noise: Tensor) -> None:
        if noise.dim() > 3:
            noise = noise - noise.flatten(2).mean(2).view(*noise.shape[:2], *(1 for _ in noise.shape[2:]))
            self._lost = noise.shape[0] * noise.shape[1]
        flat, self._count = noise.flatten(1), noise.numel()
        self._pairs = flat[:, 1:].numel()
        self._squares = float(flat.square().sum())
        self._fourths = float(flat.pow(4).sum())
        self._products = float((flat[:, 1:] * flat[:, :-1]).sum())
        rows = flat.square().mean(1) * self._count / max(self._count - self._lost, 1) - 1
        # Both tails of χ², which has a longer one above: it matters where samples are small.
        spread, above = _DEVIATIONS * math.sqrt(2 / flat.shape[1]), _DEVIATIONS**2 / flat.shape[1]
        self._rows = bool(((rows > -spread) & (rows < spread + above)).all())

    @property
    def holds(self) -> bool:
        """Whether all of it may be noise."""
        count, root = max(self._count, 1), math.sqrt(max(self._count, 1))
        variance = self._squares / max(self._count - self._lost, 1)
        kurtosis = self._fourths / count / max((self._squares / count) ** 2, 1e-30)
        pairs = max(self._pairs, 1)
        neighbours = self._products / pairs / max(variance, 1e-30)
        return (
            self._rows
            and abs(variance - 1) < _DEVIATIONS * math.sqrt(2) / root
            and abs(kurtosis - 3) < _DEVIATIONS * math.sqrt(24) / root
            and abs(neighbours) < _DEVIATIONS / math.sqrt(pairs) + self._lost / count
        )


def is_white(noise: Tensor) -> bool:
    """Whether (B, …) numbers may be standard Gaussian noise."""
    return Whiteness().add(noise)
