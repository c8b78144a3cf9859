"""The one pass that scores are made of: rows against query directions, block by block."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from diffhook.analysis.cost import Cost, cost_of
from diffhook.analysis.execution import Execution
from diffhook.analysis.grouped import Partial, Plan, Reduction, add_rows, grouped
from diffhook.analysis.methods import Method
from diffhook.analysis.tables import nearest
from diffhook.log import Block, Table

Floats = npt.NDArray[np.floating[Any]]

_ROWS = 2048  # of a block converted to float32 at once


@dataclass(frozen=True)
class RowScores:
    """Scores the rows of one block against all queries.

    Attributes:
        factors: (K, N) float32 on the rows of a sample at a snapshot; None: 1.
        directions: (K, Q, D) float32.
    """

    method: Method
    sample_ids: npt.NDArray[np.int64]
    steps: npt.NDArray[np.int64]
    factors: Floats | None
    directions: npt.NDArray[np.float32]

    def __call__(self, table: Table, block: Block) -> Partial:
        columns = {c: table.read(block, c) for c in ("sample", "step", *self.method.columns)}
        sample = np.searchsorted(self.sample_ids, columns["sample"])
        snapshot = nearest(columns["step"], self.steps)
        weights = self.weights(columns, sample, snapshot)
        projection = table.read(block, "projection")
        scores = np.zeros((len(projection), self.directions.shape[1]), np.float32)
        for start in range(0, len(projection), _ROWS):
            part = slice(start, start + _ROWS)
            numbers = projection[part].astype(np.float32)
            for k in np.unique(snapshot[part]):
                mine = snapshot[part] == k
                if mine.all():
                    np.matmul(numbers, self.directions[k].T, out=scores[part])
                else:
                    scores[part][mine] = numbers[mine] @ self.directions[k].T
        scores *= weights[:, None].astype(np.float32)
        return add_rows(sample, scores)

    def weights(self, columns: Any, sample: npt.NDArray[np.intp], snapshot: npt.NDArray[np.intp]) -> Floats:
        """(rows,) float64: c_r · f_k(r)[i]."""
        weights = self.method.row_weights(columns)
        return weights if self.factors is None else weights * self.factors[snapshot, sample]


class Strongest(NamedTuple):
    sample_ids: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]


@dataclass(frozen=True)
class ScorePass:
    """A table to be scored: how its rows weigh, against what, and where it runs.

    Attributes:
        without: (R, K, Q, D) float32: the directions again, each without one noise replicate.
    """

    table: Table
    rows: RowScores
    without: npt.NDArray[np.float32] | None
    execution: Execution

    @property
    def queries(self) -> int:
        return self.rows.directions.shape[1]

    def values(self) -> npt.NDArray[np.float32]:
        """(Q, N)."""
        found: npt.NDArray[np.float32] = self._run(self.rows, _Values())
        return found

    def top(self, k: int, opponents: bool) -> Strongest:
        """(Q, k), strongest first."""
        found: Strongest = self._run(self.rows, _TopK(self.rows.sample_ids, k, -1 if opponents else 1))
        return found

    def errors(self) -> npt.NDArray[np.float32] | None:
        """(Q, N)."""
        if self.without is None:
            return None
        found: npt.NDArray[np.float32] = self._run(self._replicated(), _Errors(len(self.without)))
        return found

    def certainty(
        self, at: npt.NDArray[np.intp], opponents: bool
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]] | None:
        """(Q, k) errors of the scores at positions ``at``, and (Q, R, k) ids of the top without each
        replicate. Both from one pass."""
        if self.without is None:
            return None
        rows, replicates = self._replicated(), len(self.without)
        top = _TopK(rows.sample_ids, at.shape[1], -1 if opponents else 1)
        errors, tops = self._run(rows, _Both(_ErrorsAt(_Errors(replicates), at), top))
        ids = tops.sample_ids.reshape(replicates, self.queries, -1)
        return errors, ids.swapaxes(0, 1)

    def cost(self) -> Cost:
        return self._cost(self.rows)

    def certainty_cost(self) -> Cost | None:
        return None if self.without is None else self._cost(self._replicated())

    def _cost(self, rows: RowScores) -> Cost:
        count, width = len(rows.sample_ids), rows.directions.shape[1]
        plan = Plan.make(count, width, self.execution)
        kept = rows.directions.nbytes + count * width * 4
        if rows.factors is not None:
            kept += rows.factors.nbytes
        return cost_of(self.table, plan, count, kept, self.execution)

    def _replicated(self) -> RowScores:
        assert self.without is not None
        replicates, snapshots, queries, dim = self.without.shape
        directions = self.without.swapaxes(0, 1).reshape(snapshots, replicates * queries, dim)
        return replace(self.rows, directions=directions)

    def _run(self, rows: RowScores, reduction: Reduction) -> Any:
        plan = Plan.make(len(rows.sample_ids), rows.directions.shape[1], self.execution)
        return grouped(self.table, rows, plan, reduction, self.execution, "scoring rows")


class _Values:
    def reduce(self, start: int, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
        return np.ascontiguousarray(values.T, dtype=np.float32)

    def combine(self, results: list[npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
        return np.concatenate(results, axis=1)


@dataclass(frozen=True)
class _Errors:
    replicates: int

    def reduce(self, start: int, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
        each = values.reshape(len(values), self.replicates, -1)
        squares = np.square(each - each.mean(1, keepdims=True)).sum(1)
        errors = np.sqrt(squares * (self.replicates - 1) / self.replicates)
        return np.ascontiguousarray(errors.T, dtype=np.float32)

    def combine(self, results: list[npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
        return np.concatenate(results, axis=1)


@dataclass(frozen=True)
class _ErrorsAt:
    """The errors at some positions of each query."""

    errors: _Errors
    at: npt.NDArray[np.intp]  # (Q, k)

    def reduce(self, start: int, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
        here = (self.at >= start) & (self.at < start + len(values))
        mine = np.where(here, self.at - start, 0)
        found: npt.NDArray[np.float32] = np.take_along_axis(self.errors.reduce(start, values), mine, 1)
        return np.where(here, found, np.float32(0))

    def combine(self, results: list[npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
        return np.sum(results, axis=0)


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
