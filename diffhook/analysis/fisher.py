"""How unlike the others a sample is by several signals together: Fisher's method over their tails."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

_TAIL = 0.9  # quantile beyond which a signal's tail is taken for exponential


def combined(signals: Sequence[npt.NDArray[Any]]) -> npt.NDArray[np.float64]:
    """(N,) Σ over signals of −log10 p (Fisher's method): one loud signal is heard among quiet ones.

    Args:
        signals: (N,) each, high: an outlier; NaN where a signal knows nothing, which counts as p = 1.
    """
    return np.sum([-log10_tail(values) for values in signals], axis=0)


def log10_tail(values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """(N,) log10 of the probability of so high a value, 0 for NaN.

    Up to the 90% quantile it is the share of values as high; beyond, the tail is exponential, with the
    median of the values there. A median, for what is looked for lies in the tail and must not stretch it.
    """
    known = np.isfinite(values)
    found = np.zeros(len(values))
    if not known.any():
        return found
    mine = values[known].astype(np.float64)
    start = float(np.quantile(mine, _TAIL))
    beyond = mine - start
    scale = float(np.median(beyond[beyond > 0])) / np.log(2) if (beyond > 0).any() else 1.0
    order = np.sort(mine)
    share = (len(mine) - np.searchsorted(order, mine, side="left")) / len(mine)
    tail = np.log10(1 - _TAIL) - np.maximum(beyond, 0) / scale / np.log(10)
    found[known] = np.where(beyond > 0, tail, np.log10(share))
    return found
