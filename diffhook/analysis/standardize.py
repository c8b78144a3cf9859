"""Norms set against those of other samples at similar timesteps, at the same stage of training."""

from __future__ import annotations

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


def standardized_norms(table: Table, bins: int = 20) -> npt.NDArray[np.float64]:
    """(rows,) robust standard deviations of log norm within timestep bin and stage of training.

    NaN where the norm is zero; +∞ where it is not finite.
    """
    norm = table["grad_norm"].astype(np.float64)
    finite = np.isfinite(norm) & (norm > 0)
    result = np.where(np.isfinite(norm), np.nan, np.inf)
    timestep = np.nan_to_num(table["timestep"][finite])
    stages = min(max(int(finite.sum()) // (bins * _ROWS_PER_CELL), 1), 8)
    by_time = assign(timestep, bin_edges(timestep, bins))
    step = table["step"][finite].astype(np.float64)
    cell = by_time * stages + assign(step, bin_edges(step, stages))
    logs = np.log(norm[finite])
    deviations = np.zeros(len(logs))
    for index in np.unique(cell):
        rows = cell == index
        median = np.median(logs[rows])
        spread = 1.4826 * np.median(np.abs(logs[rows] - median))
        deviations[rows] = (logs[rows] - median) / max(spread, 1e-6)
    result[finite] = deviations
    return result
