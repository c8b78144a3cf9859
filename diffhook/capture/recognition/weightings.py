"""Which weighting by timestep the rows of a loss have, up to a constant factor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from diffhook.capture.objective.parametrization import Parametrization
from diffhook.capture.objective.weighting import P2, CosMap, MinSNR, SigmaPower, SNRPower, Uniform, Weighting
from diffhook.capture.recognition.observation import agree

_FEW = 3  # timesteps below γ from which it is believed


class Weights(NamedTuple):
    """weights = factor · weighting(timesteps), to a relative error."""

    weighting: Weighting
    factor: float
    error: float


def find_weighting(
    timesteps: Tensor, weights: Tensor, parametrization: Parametrization, tolerance: float
) -> Weights | None:
    """The first known weighting that gives the weights.

    Args:
        timesteps: (R,) in the scheduler's units.
        weights: (R,) of rows at those timesteps.
        tolerance: relative error of a weight.
    """
    if not (weights > 0).all():
        return None
    for weighting in _candidates(timesteps, weights, parametrization, tolerance):
        ratios = weights / weighting(timesteps, parametrization).to(weights)
        factor = _rounded(float(ratios.median()), tolerance)
        errors = (ratios / factor - 1).abs()
        if agree(errors, tolerance):
            return Weights(weighting, factor, float(errors.quantile(0.95)))
    return None


def _candidates(
    timesteps: Tensor, weights: Tensor, kind: Parametrization, tolerance: float
) -> Iterator[Weighting]:
    yield Uniform()
    if (gamma := _min_snr(timesteps, weights, kind, tolerance)) is not None:
        yield MinSNR(gamma)
    yield from (SNRPower(power) for power in (1.0, 0.5, -0.5, -1.0))
    yield from (SigmaPower(power) for power in (-2.0, -1.0, 1.0, 2.0))
    yield from (CosMap(power) for power in (0.0, 2.0))
    yield from (P2(gamma) for gamma in (0.5, 1.0))


def _min_snr(timesteps: Tensor, weights: Tensor, kind: Parametrization, tolerance: float) -> float | None:
    """γ, where rows of both sides of it are there: on the error of the sample, weights are min(SNR, γ)."""
    clamped = weights / kind.sample_factor(timesteps).to(weights)
    ratio = clamped / kind.snr(timesteps).to(weights)
    factor, largest = ratio.max(), clamped.max()
    below = ratio > (1 - 2 * tolerance) * factor
    if bool(below.all()) or len(timesteps[below].unique()) < _FEW:
        return None
    return _rounded(float(largest / factor), tolerance)


def _rounded(value: float, tolerance: float) -> float:
    """The number of two digits that is meant, where one is that near."""
    near = float(f"{value:.2g}")
    return near if near and abs(value / near - 1) < tolerance else value
