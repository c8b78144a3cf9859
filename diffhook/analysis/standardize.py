"""Numbers set against those of other samples at similar timesteps, at the same stage of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from diffhook.log import Table

LOOKED_AT = 1 << 21  # rows from which quantiles are learned
_ROWS_PER_CELL = 50  # fewer make a poor median
_UPPER = 0.8416  # standard deviations from a normal's median to its 80% quantile


def bin_edges(values: npt.NDArray[np.floating], bins: int) -> npt.NDArray[np.float64]:
    """Edges of ``bins`` bins of equal count; fewer where values repeat."""
    quantiles = np.quantile(values, np.linspace(0, 1, bins + 1)) if len(values) else np.zeros(2)
    return np.unique(quantiles).astype(np.float64)


def assign(values: npt.NDArray[np.floating], edges: npt.NDArray[np.float64]) -> npt.NDArray[np.intp]:
    """The bin of each value."""
    return np.searchsorted(edges, values, side="right").clip(1, max(len(edges) - 1, 1)) - 1


def looked_at(table: Table, columns: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
    """Columns of all rows, or of every m-th where the table has more than :data:`LOOKED_AT`.

    Reads shard by shard, and holds no more than it returns.
    """
    stride = -(-len(table) // LOOKED_AT)
    parts: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in columns}
    for block in table.blocks():
        for name in columns:
            # A copy: a view would hold all of the block.
            parts[name].append(table.read(block, name)[-block.offset % stride :: stride].copy())
    return {name: np.concatenate(found) for name, found in parts.items()}


@dataclass(frozen=True)
class Standard:
    """What is usual of a column's log within timestep bin and stage of training.

    Attributes:
        column: its name.
        timesteps, stages: edges of the bins of timestep and step.
        medians, spreads: (timestep bins, stages); NaN where nothing was seen.
    """

    column: str
    timesteps: npt.NDArray[np.float64]
    stages: npt.NDArray[np.float64]
    medians: npt.NDArray[np.float64]
    spreads: npt.NDArray[np.float64]

    @classmethod
    def learn(cls, column: str, rows: Mapping[str, npt.NDArray[Any]], bins: int = 20) -> Standard:
        """From rows of the column, "timestep" and "step"."""
        values = rows[column].astype(np.float64)
        known = np.isfinite(values) & (values > 0)
        timestep = np.nan_to_num(rows["timestep"][known])
        step = rows["step"][known].astype(np.float64)
        stages = min(max(int(known.sum()) // (bins * _ROWS_PER_CELL), 1), 8)
        edges = bin_edges(timestep, bins), bin_edges(step, stages)
        cell = _cells(timestep, step, *edges)
        shape = tuple(max(len(edge) - 1, 1) for edge in edges)
        medians, spreads = np.full((2, *shape), np.nan)
        logs = np.log(values[known])
        order = np.argsort(cell, kind="stable")
        for mine in np.split(order, np.flatnonzero(np.diff(cell[order])) + 1):
            if len(mine):
                medians.flat[cell[mine[0]]], spreads.flat[cell[mine[0]]] = _centre(logs[mine])
        return cls(column, *edges, medians, spreads)

    def deviations(self, rows: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.float64]:
        """(rows,) robust standard deviations of the log from what is usual.

        NaN where the value is zero or unknown; +∞ where it is infinite, for norms also where it is NaN.
        """
        result, logs, cell, known = self._placed(rows)
        result[known] = (logs - self.medians.flat[cell]) / self.spreads.flat[cell]
        return result

    def ratios(self, rows: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.float64]:
        """(rows,) the value over what is usual. NaN and +∞ as for :meth:`deviations`."""
        result, logs, cell, known = self._placed(rows)
        result[known] = np.exp(logs - self.medians.flat[cell])
        return result

    def _placed(self, rows: Mapping[str, npt.NDArray[Any]]) -> tuple[Any, Any, Any, Any]:
        """(rows,) NaN or +∞; logs and cells of the rows whose value is known; (rows,) which these are."""
        values = rows[self.column].astype(np.float64)
        known = np.isfinite(values) & (values > 0)
        broken = ~np.isfinite(values) if self.column == "grad_norm" else np.isposinf(values)
        timestep = np.nan_to_num(rows["timestep"][known])
        cell = _cells(timestep, rows["step"][known].astype(np.float64), self.timesteps, self.stages)
        return np.where(broken, np.inf, np.nan), np.log(values[known]), cell, known


def _cells(
    timestep: npt.NDArray[np.floating],
    step: npt.NDArray[np.float64],
    timesteps: npt.NDArray[np.float64],
    stages: npt.NDArray[np.float64],
) -> npt.NDArray[np.intp]:
    return assign(timestep, timesteps) * max(len(stages) - 1, 1) + assign(step, stages)


def robust_deviations(values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """(value − median) / (1.4826 · MAD): standard deviations, were the values normal. Keeps NaN.

    Where more than half of the values are equal, 1.2533 · the mean absolute deviation divides.
    """
    known = values[~np.isnan(values)]
    if not len(known):
        return np.full(len(values), np.nan)
    median, spread = _centre(known)
    deviations: npt.NDArray[np.float64] = (values - median) / spread
    return deviations


def stand_out(values: npt.NDArray[Any], deviations: float) -> npt.NDArray[np.bool_]:
    """(N,) which values lie so many standard deviations above the median, by :func:`robust_deviations` and by
    the 80% quantile.

    Where most samples are alike, as pictures of one sky, the former are small and all of another kind would
    lie far above; where those are a fifth of all or more, they are no outliers.
    """
    found = np.nan_to_num(robust_deviations(values)) > deviations
    if found.any():
        median, upper = np.nanquantile(values, [0.5, 0.8])
        found &= values - median > deviations * (upper - median) / _UPPER
    return found


def _centre(values: npt.NDArray[Any]) -> tuple[float, float]:
    """Median and robust spread."""
    median = float(np.median(values))
    distances = np.abs(values - median)
    return median, float(1.4826 * np.median(distances) or 1.2533 * distances.mean() or 1.0)
