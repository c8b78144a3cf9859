"""The one pass that scores are made of, and what is asked of it: all, the strongest, how sure they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from diffhook.analysis.cost import Cost, cost_of
from diffhook.analysis.draws import Draws, DrawSums, Spread, Uncertainty, Without
from diffhook.analysis.execution import Execution
from diffhook.analysis.grouped import Division, Reduction, grouped
from diffhook.analysis.row_scores import RowScores
from diffhook.log import Table


class Strongest(NamedTuple):
    sample_ids: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]


@dataclass(frozen=True)
class ScorePass:
    """A table to be scored: how its rows weigh, against what, and where it runs.

    Attributes:
        draws: what is known of how far other draws of noise would move the scores; None: nothing.
    """

    table: Table
    rows: RowScores
    draws: Draws | None
    execution: Execution

    @property
    def queries(self) -> int:
        return self.rows.queries

    def values(self) -> npt.NDArray[np.float32]:
        """(Q, N)."""
        found: npt.NDArray[np.float32] = self._run(self.rows, _Values())
        return found

    def top(self, k: int, opponents: bool) -> Strongest:
        """(Q, k), strongest first."""
        found: Strongest = self._run(self.rows, _TopK(self.rows.sample_ids, k, -1 if opponents else 1))
        return found

    def uncertainty(self) -> Uncertainty | None:
        """(Q, N) each."""
        if self.draws is None:
            return None
        sums = DrawSums(self.rows, self.draws)
        found: Uncertainty = self._run_draws(sums, Spread(sums.layout, self.draws.variance_share()))
        return found

    def uncertainty_at(
        self, at: npt.NDArray[np.intp], opponents: bool
    ) -> tuple[Uncertainty, npt.NDArray[np.int64] | None] | None:
        """(Q, k) each, of the scores at positions ``at``, and (Q, L, k) ids of the top in each
        leave-out, None where there are none. Both from one pass."""
        if self.draws is None:
            return None
        sums = DrawSums(self.rows, self.draws)
        layout = sums.layout
        spread = Spread(layout, self.draws.variance_share(), at)
        if layout.leave_outs is None:
            return self._run_draws(sums, spread), None
        top = _TopK(self.rows.sample_ids, at.shape[1], -1 if opponents else 1)
        found, tops = self._run_draws(sums, _Both(spread, Without(layout, top)))
        return found, tops.sample_ids.reshape(layout.leave_outs.count, self.queries, -1).swapaxes(0, 1)

    def cost(self) -> Cost:
        return self._cost(self.rows)

    def uncertainty_cost(self) -> Cost | None:
        if self.draws is None:
            return None
        sums = DrawSums(self.rows, self.draws)
        return self._cost(sums.rows, sums.plan(self.execution))

    def _cost(self, rows: RowScores, plan: Division | None = None) -> Cost:
        count, width = len(rows.sample_ids), rows.queries
        plan = plan or Division.make(count, width, self.execution)
        kept = rows.directions.nbytes + count * width * 4
        if rows.factors is not None:
            kept += rows.factors.nbytes
        return cost_of(self.table, plan, count, kept, self.execution)

    def _run_draws(self, sums: DrawSums, reduction: Reduction) -> Any:
        title = "scoring rows of other draws"
        return grouped(self.table, sums, sums.plan(self.execution), reduction, self.execution, title)

    def _run(self, rows: RowScores, reduction: Reduction) -> Any:
        plan = Division.make(len(rows.sample_ids), rows.queries, self.execution)
        return grouped(self.table, rows, plan, reduction, self.execution, "scoring rows")


class _Values:
    def reduce(self, start: int, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
        return np.ascontiguousarray(values.T, dtype=np.float32)

    def combine(self, results: list[npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
        return np.concatenate(results, axis=1)


@dataclass(frozen=True)
class _Both:
    first: Reduction
    second: Reduction

    def reduce(self, start: int, values: npt.NDArray[np.float64]) -> tuple[Any, Any]:
        return self.first.reduce(start, values), self.second.reduce(start, values)

    def combine(self, results: list[tuple[Any, Any]]) -> tuple[Any, Any]:
        first, second = zip(*results, strict=True)
        return self.first.combine(list(first)), self.second.combine(list(second))


@dataclass(frozen=True)
class _TopK:
    sample_ids: npt.NDArray[np.int64]
    k: int
    sign: int

    def reduce(self, start: int, values: npt.NDArray[np.float64]) -> Strongest:
        scores = np.ascontiguousarray(values.T, dtype=np.float32)
        index = strongest(self.sign * scores, self.k)
        return Strongest(self.sample_ids[start + index], np.take_along_axis(scores, index, 1))

    def combine(self, results: list[Strongest]) -> Strongest:
        ids = np.concatenate([found.sample_ids for found in results], axis=1)
        scores = np.concatenate([found.scores for found in results], axis=1)
        index = strongest(self.sign * scores, self.k)
        return Strongest(np.take_along_axis(ids, index, 1), np.take_along_axis(scores, index, 1))


def strongest(values: npt.NDArray[Any], k: int) -> npt.NDArray[np.intp]:
    """(Q, k) positions of each row's k largest values, largest first; of equals, the first."""
    k = min(k, values.shape[1])
    found = np.empty((len(values), k), np.intp)
    for row, mine in enumerate(values):
        chosen = np.arange(len(mine))
        if k < len(mine):
            least = np.partition(mine, len(mine) - k)[len(mine) - k]
            above = np.flatnonzero(mine > least)
            chosen = np.concatenate([above, np.flatnonzero(mine == least)[: k - len(above)]])
        found[row] = chosen[np.argsort(-mine[chosen], kind="stable")]
    return found
