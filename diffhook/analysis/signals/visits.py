"""What is unusual about the visits of each sample, counted in one pass over a column."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from diffhook.analysis.execution import Execution
from diffhook.analysis.grouped import Division, Partial, add_rows, grouped
from diffhook.analysis.sample_sums import Whole
from diffhook.analysis.standardize import Standard, looked_at
from diffhook.log import Block, Table

NOTABLE = 3.0  # robust standard deviations
_HIGH = 2.0  # mean deviations
HIGH_SHARE = 0.1  # of the rows count as high

Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class VisitCounts:
    """Visits of each sample, (N,) float64 each, by how far a column lies above what is usual.

    Attributes:
        seen: with a number that is finite and not zero.
        mean: of their robust deviations; NaN without any.
        notable: more than NOTABLE deviations above.
        high: among the highest tenth of all rows.
        infinite: with none that is finite.
    """

    seen: Floats
    mean: Floats
    notable: Floats
    high: Floats
    infinite: Floats


def count_visits(
    table: Table, sample_ids: npt.NDArray[np.int64], column: str, execution: Execution
) -> VisitCounts:
    """Set the column against its usual values at each timestep and stage, row by row."""
    rows = looked_at(table, (column, "timestep", "step"))
    standard = Standard.learn(column, rows)
    deviations = standard.deviations(rows)
    usable = np.isfinite(deviations)
    least = float(np.quantile(deviations[usable], 1 - HIGH_SHARE)) if usable.any() else np.inf
    del rows, deviations
    counts = _Counts(sample_ids, standard, least)
    plan = Division.make(len(sample_ids), 5, execution)
    sums = grouped(table, counts, plan, Whole(), execution, f"reading {column}")
    seen, total, notable, high, infinite = sums.T
    mean = np.divide(total, seen, out=np.full(len(seen), np.nan), where=seen > 0)
    return VisitCounts(seen, mean, notable, high, infinite)


def often(visits: VisitCounts) -> npt.NDArray[np.bool_]:
    """Whether a quarter of the visits or more were notable, and all of them high on average: one of many is
    chance."""
    notable = (visits.notable > 0) & (4 * visits.notable >= visits.seen)
    found: npt.NDArray[np.bool_] = notable & (np.nan_to_num(visits.mean) > _HIGH)
    return found


@dataclass(frozen=True)
class _Counts:
    sample_ids: npt.NDArray[np.int64]
    standard: Standard
    least: float

    def __call__(self, table: Table, block: Block) -> Partial:
        rows = {name: table.read(block, name) for name in (self.standard.column, "timestep", "step")}
        deviations = self.standard.deviations(rows)
        usable = np.isfinite(deviations)
        finite = np.where(usable, deviations, -np.inf)
        counted = [
            usable,
            np.where(usable, deviations, 0.0),
            finite > NOTABLE,
            finite > self.least,
            np.isinf(deviations),
        ]
        sample = table.read(block, "sample")
        return add_rows(np.searchsorted(self.sample_ids, sample), np.column_stack(counted))
