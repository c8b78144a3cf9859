"""How much of one further draw per channel was added to noise."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

_SURE = 4.0  # deviations of the channels' variance from which there is an offset
_USUAL = (0.02, 0.03, 0.0357, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5)  # of scripts and their advice
_MEANT = 2.0  # errors within which one of those is meant, or else the number of fewest digits


class Measured(NamedTuple):
    """A noise offset, 0 where nothing speaks for one.

    Attributes:
        value: that is meant: within twice the error a usual one, or else the one of fewest digits.
        measured, error: as it was found, and its standard error.
    """

    value: float = 0.0
    measured: float = 0.0
    error: float = 0.0


class NoiseOffset:
    """Channels' means of noise have the variance 1/n of its n elements, and the offset's square on top."""

    def __init__(self) -> None:
        self._squares, self._count, self._usual = 0.0, 0, 0.0

    def add(self, noise: Tensor) -> None:
        """(B, C, …) of a pass."""
        if noise.dim() > 2:
            means = noise.float().flatten(2).mean(2)
            self._squares += float(means.square().sum())
            self._count += means.numel()
            self._usual = 1 / noise[0, 0].numel()

    def estimate(self) -> Measured:
        """By all passes so far."""
        if not self._count:
            return Measured()
        variance = self._squares / self._count
        excess, spread = variance - self._usual, variance * (2 / self._count) ** 0.5
        if excess <= _SURE * spread or excess <= 1e-4:
            return Measured()
        measured = excess**0.5
        error = spread / (2 * measured)
        usual = sorted(_USUAL, key=lambda each: abs(each - measured))[:1]
        near = (*usual, *(float(f"{measured:.{digits}g}") for digits in (1, 2)))
        value = next((each for each in near if abs(each - measured) <= _MEANT * error), round(measured, 4))
        return Measured(value, measured, error)
