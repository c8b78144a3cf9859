"""How much of one further draw per channel was added to noise."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

_SURE = 4.0  # deviations of the channels' variance from which there is an offset
_USUAL = (0.02, 0.03, 0.0357, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5)  # of scripts and their advice
_COMMON = (0.05, 0.1)  # by far: an error's worth ahead of the others
_MEANT = 3.0  # errors within which one of those is meant: one run in twenty is off by more than two …
_NEAR = 2.0  # … and else the number of fewest digits


class MeasuredOffset(NamedTuple):
    """A noise offset, 0 where nothing speaks for one.

    Attributes:
        value: that is meant: within three times the error a usual one, or else the one of fewest digits.
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

    def estimate(self) -> MeasuredOffset:
        """By all passes so far."""
        if not self._count:
            return MeasuredOffset()
        variance = self._squares / self._count
        excess = variance - self._usual
        if excess <= _SURE * variance * self._relative or excess <= 1e-4:
            return MeasuredOffset()
        measured = excess**0.5
        error = self._error(measured)
        usual = min(_USUAL, key=lambda each: abs(each - measured) / self._error(each) + (each not in _COMMON))
        if abs(usual - measured) <= _MEANT * min(error, self._error(usual)):
            return MeasuredOffset(usual, measured, error)
        near = (float(f"{measured:.{digits}g}") for digits in (1, 2))
        value = next((each for each in near if abs(each - measured) <= _NEAR * error), round(measured, 4))
        return MeasuredOffset(value, measured, error)

    @property
    def _relative(self) -> float:
        """Standard error of a variance, as a share of it."""
        return float((2 / self._count) ** 0.5)

    def _error(self, offset: float) -> float:
        """With which an offset is measured."""
        return (self._usual + offset**2) * self._relative / (2 * offset)
