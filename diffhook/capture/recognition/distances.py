"""Which distance a loss takes, read off its slope at known differences."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffhook.capture.objective.distance import Absolute, Distance, Huber, PseudoHuber, Squared, relative

_FEW = 8  # elements beyond δ from which a δ is believed


def fit(distance: Distance, difference: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """The rows' weights on a distance, and how far they are from explaining the slope.

    Args:
        difference: (B, …) prediction − target.
        slope: (B, …) of what the loss takes the mean of.

    Returns:
        (B,) weights by least squares, and (B,) relative errors of the slope.
    """
    expected = distance.slope(difference.float()).flatten(1)
    found = slope.flatten(1)
    weights = (found * expected).sum(1) / expected.square().sum(1).clamp(min=1e-30)
    return weights, relative(weights[:, None] * expected, found)


def candidates(difference: Tensor, slope: Tensor) -> list[Distance]:
    """Distances that may explain the slope, simplest first, with the parameters that the rows ask for."""
    found: list[Distance] = [Squared(), Absolute()]
    difference, slope = difference.flatten(1).cpu().double(), slope.flatten(1).cpu().double()
    for estimate in (_huber, _pseudo_huber):
        if (distance := estimate(difference, slope)) is not None:
            found.append(distance)
    return found


def _huber(difference: Tensor, slope: Tensor) -> Distance | None:
    """δ: where the slope is at its largest, in units of the weight that small differences have."""
    deltas = []
    for d, s in zip(difference.abs(), slope.abs(), strict=True):
        beyond = s > 0.999 * s.max()
        inner = ~beyond & (d > 0)
        if int(beyond.sum()) >= _FEW and int(inner.sum()) >= _FEW:
            deltas.append(s.max() / (s[inner] / d[inner]).median())
    return _with(Huber, deltas)


def _pseudo_huber(difference: Tensor, slope: Tensor) -> Distance | None:
    """(d / slope)² is a line in d²: its ratio of intercept to slope is c²."""
    squares = []
    for d, s in zip(difference, slope, strict=True):
        known = (s != 0) & (d != 0)
        if int(known.sum()) < _FEW:
            continue
        x, y = d[known].square(), (d[known] / s[known]).square()
        rise = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
        squares.append((y.mean() - rise * x.mean()) / rise)
    usable = [value.sqrt() for value in squares if value > 0 and torch.isfinite(value)]
    return _with(PseudoHuber, usable)


def _with(kind: Callable[[float], Distance], values: list[Tensor]) -> Distance | None:
    if not values:
        return None
    value = float(torch.stack(values).median())
    return kind(value) if value > 0 else None
