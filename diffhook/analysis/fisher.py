"""How unlike the others a sample is by several signals together: Fisher's method over their tails."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

_MIDDLE, _UPPER = 0.5, 0.8  # quantiles between which the tail's scale is read, where outliers are few


def combined(
    signals: Sequence[npt.NDArray[Any]], weights: Sequence[float] | None = None
) -> npt.NDArray[np.float64]:
    """(N,) Σ over signals of −log10 p (Fisher's method): one loud signal is heard among quiet ones.

    Args:
        signals: (N,) each, high: an outlier; NaN where a signal knows nothing, which counts as p = 1.
        weights: of the signals (Good 1955); by default 1 each.
    """
    tails = np.stack([-log10_tail(values) for values in signals])
    return np.asarray(np.ones(len(tails)) if weights is None else weights) @ tails


def log10_tail(values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """(N,) log10 of the probability of so high a value, 0 for NaN.

    Up to the median it is the share of values as high. Beyond, the tail is exponential, with the scale that
    values have from there to the 80% quantile: what is looked for lies above and must not stretch it, even
    where a tenth of all samples is broken.
    """
    known = np.isfinite(values)
    found = np.zeros(len(values))
    if not known.any():
        return found
    mine = values[known].astype(np.float64)
    start, upper = np.quantile(mine, [_MIDDLE, _UPPER])
    beyond = mine - start
    scale = _scale(beyond, float(upper - start))
    order = np.sort(mine)
    share = (len(mine) - np.searchsorted(order, mine, side="left")) / len(mine)
    tail = np.log10(1 - _MIDDLE) - np.maximum(beyond, 0) / scale / np.log(10)
    found[known] = np.where(beyond > 0, tail, np.log10(share))
    return found


def _scale(beyond: npt.NDArray[np.float64], range_: float) -> float:
    """Of an exponential tail that starts at the median; of the values beyond alone where all up to the 80%
    quantile are equal."""
    if range_ > 0:
        return range_ / float(np.log((1 - _MIDDLE) / (1 - _UPPER)))
    above = beyond[beyond > 0]
    return float(np.median(above)) / float(np.log(2)) if len(above) else 1.0
