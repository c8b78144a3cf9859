"""A mean over queries, and how sure it is."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

_RESAMPLES = 1000


class Estimate(NamedTuple):
    """A mean and its standard error, by bootstrap."""

    mean: float
    error: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.error:.3f}"


def estimate(values: npt.NDArray[np.floating], seed: int = 0) -> Estimate:
    """The mean of (n,) values; NaN among them (a query that tells nothing) is left out."""
    known = values[np.isfinite(values)]
    if not len(known):
        return Estimate(float("nan"), float("nan"))
    picks = np.random.default_rng(seed).integers(0, len(known), (_RESAMPLES, len(known)))
    return Estimate(float(known.mean()), float(known[picks].mean(1).std()))
