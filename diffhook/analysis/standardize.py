"""Numbers set against those of other samples at similar timesteps, at the same stage of training."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from diffhook.log import Table

_ROWS_PER_CELL = 50  # fewer make a poor median


def bin_edges(values: npt.NDArray[np.floating], bins: int) -> npt.NDArray[np.float64]:
    """Edges of ``bins`` bins of equal count; fewer where values repeat."""
    quantiles = np.quantile(values, np.linspace(0, 1, bins + 1)) if len(values) else np.zeros(2)
    return np.unique(quantiles).astype(np.float64)


def assign(values: npt.NDArray[np.floating], edges: npt.NDArray[np.float64]) -> npt.NDArray[np.intp]:
    """The bin of each value."""
    return np.searchsorted(edges, values, side="right").clip(1, max(len(edges) - 1, 1)) - 1


def standardized(table: Table, column: str, bins: int = 20) -> npt.NDArray[np.float64]:
    """(rows,) robust standard deviations of the column's log within timestep bin and stage of training.

    NaN where the value is zero or unknown; +∞ where it is infinite, for norms also where it is NaN.
    """
    values = table[column].astype(np.float64)
    finite = np.isfinite(values) & (values > 0)
    broken = ~np.isfinite(values) if column == "grad_norm" else np.isposinf(values)
    result = np.where(broken, np.inf, np.nan)
    timestep = np.nan_to_num(table["timestep"][finite])
    stages = min(max(int(finite.sum()) // (bins * _ROWS_PER_CELL), 1), 8)
    by_time = assign(timestep, bin_edges(timestep, bins))
    step = table["step"][finite].astype(np.float64)
    cell = by_time * stages + assign(step, bin_edges(step, stages))
    logs = np.log(values[finite])
    deviations = np.zeros(len(logs))
    order = np.argsort(cell, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(cell[order])) + 1):
        deviations[rows] = robust_deviations(logs[rows])
    result[finite] = deviations
    return result


def robust_deviations(values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """(value − median) / (1.4826 · MAD): standard deviations, were the values normal. Keeps NaN.

    Where more than half of the values are equal, 1.2533 · the mean absolute deviation divides.
    """
    known = values[~np.isnan(values)]
    if not len(known):
        return np.full(len(values), np.nan)
    median = np.median(known)
    distances = np.abs(known - median)
    spread = 1.4826 * np.median(distances) or 1.2533 * distances.mean() or 1.0
    deviations: npt.NDArray[np.float64] = (values - median) / spread
    return deviations
