"""How far a prediction is from its target, element by element. One class a kind, registered by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from diffhook.errors import ConfigurationError


class Distance(ABC):
    """What a loss takes the mean of, over a sample's elements."""

    kind: str

    @abstractmethod
    def __call__(self, difference: Tensor) -> Tensor:
        """Of every element of prediction − target."""

    @abstractmethod
    def slope(self, difference: Tensor) -> Tensor:
        """Its derivative by the prediction."""

    def losses(self, difference: Tensor, gradient: Tensor) -> Tensor:
        """What rows have added to a loss that is a weighted sum of this distance over elements.

        Whatever its weights w are, also within a sample: with g = w D'(d), w D(d) is g D(d) / D'(d).

        Args:
            difference: (R, …) d.
            gradient: (R, …) g, of the loss by the difference.

        Returns:
            (R,) float32 Σ w D(d).
        """
        difference = difference.flatten(1).float()
        slope = self.slope(difference)
        per_slope = self(difference) / torch.where(slope == 0, torch.ones_like(slope), slope)
        return (gradient.flatten(1).float() * per_slope).sum(1)

    def describe(self) -> dict[str, Any]:
        """Kind and parameters, as JSON; :func:`make_distance` reads it."""
        return {"kind": self.kind, **vars(self)}


class Squared(Distance):
    """d², of mean squared errors."""

    kind = "squared"

    def __call__(self, difference: Tensor) -> Tensor:
        return difference.square()

    def slope(self, difference: Tensor) -> Tensor:
        return 2 * difference

    def losses(self, difference: Tensor, gradient: Tensor) -> Tensor:
        return (gradient.flatten(1).float() * difference.flatten(1).float()).sum(1) / 2


class Absolute(Distance):
    """|d|, of L1 losses."""

    kind = "absolute"

    def __call__(self, difference: Tensor) -> Tensor:
        return difference.abs()

    def slope(self, difference: Tensor) -> Tensor:
        return difference.sign()

    def losses(self, difference: Tensor, gradient: Tensor) -> Tensor:
        return (gradient.flatten(1).float() * difference.flatten(1).float()).sum(1)


class Huber(Distance):
    """d²/2 up to δ, δ(|d| − δ/2) from there on, as ``torch.nn.functional.huber_loss``."""

    kind = "huber"

    def __init__(self, delta: float = 1.0) -> None:
        self.delta = _positive("delta", delta)

    def __call__(self, difference: Tensor) -> Tensor:
        near = difference.abs().clamp(max=self.delta)
        return near * (difference.abs() - near / 2)

    def slope(self, difference: Tensor) -> Tensor:
        return difference.clamp(-self.delta, self.delta)


class PseudoHuber(Distance):
    """2c (√(d² + c²) − c), as diffusers' scripts have it (arXiv 2403.16728)."""

    kind = "pseudo_huber"

    def __init__(self, c: float = 0.1) -> None:
        self.c = _positive("c", c)

    def __call__(self, difference: Tensor) -> Tensor:
        return 2 * self.c * ((difference.square() + self.c**2).sqrt() - self.c)

    def slope(self, difference: Tensor) -> Tensor:
        return 2 * self.c * difference / (difference.square() + self.c**2).sqrt()


def _positive(name: str, value: float) -> float:
    if not value > 0:
        raise ConfigurationError(f"{name} is {value}; expected a positive number")
    return float(value)


DISTANCES: dict[str, type[Distance]] = {kind.kind: kind for kind in (Squared, Absolute, Huber, PseudoHuber)}


def make_distance(given: Distance | str | dict[str, Any] | None) -> Distance:
    """A distance from the user's word: one, its name, its description, or None for squared errors.

    Raises:
        ConfigurationError: no such kind.
    """
    if given is None:
        return Squared()
    if isinstance(given, Distance):
        return given
    described: dict[str, Any] = {"kind": given} if isinstance(given, str) else dict(given)
    kind = described.pop("kind", None)
    if kind not in DISTANCES:
        raise ConfigurationError(f"distance is {given!r}; expected one of {', '.join(DISTANCES)}")
    return DISTANCES[kind](**described)


def relative(found: Tensor, expected: Tensor) -> Tensor:
    """(B,) ‖found − expected‖ / ‖expected‖ of rows; 0 where both are."""
    difference = (found - expected).flatten(1).norm(dim=1)
    size = expected.flatten(1).norm(dim=1)
    return torch.where(difference > 0, difference / size.clamp(min=1e-30), torch.zeros_like(difference))
