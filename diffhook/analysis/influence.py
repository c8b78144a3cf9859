"""Which training samples made this one: influence of every training sample on every query."""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from diffhook.analysis.methods import Method, find_method
from diffhook.analysis.scan import Partial, scan, sum_by_position
from diffhook.analysis.tables import nearest, query_table, source_table
from diffhook.errors import ConfigurationError
from diffhook.log import Block, RunLog, Table
from diffhook.notebook import Displayed


class Top(NamedTuple):
    """The k samples of highest (or lowest) score for each query."""

    sample_ids: npt.NDArray[np.int64]  # (Q, k)
    scores: npt.NDArray[np.float32]  # (Q, k)


@dataclass(frozen=True)
class Scores(Displayed):
    """Influence scores; computed when :attr:`values` is first read.

    Positive: a step on the sample lowers the query's loss (proponent); negative: it raises it.

    Attributes:
        query_ids: (Q,) int64.
        sample_ids: (N,) int64, ascending.
        method: the method's name.
    """

    query_ids: npt.NDArray[np.int64]
    sample_ids: npt.NDArray[np.int64]
    method: str
    _compute: Any = field(repr=False)

    @cached_property
    def values(self) -> npt.NDArray[np.float32]:
        """(Q, N) float32."""
        found: npt.NDArray[np.float32] = self._compute()
        return found

    def top(self, k: int, *, opponents: bool = False) -> Top:
        """The k strongest proponents of each query, strongest first (or opponents).

        Raises:
            ConfigurationError: k < 1.
        """
        if k < 1:
            raise ConfigurationError(f"k is {k}; expected at least 1")
        values = self.values if opponents else -self.values
        k = min(k, values.shape[1])
        part = np.argpartition(values, k - 1, axis=1)[:, :k]
        order = np.argsort(np.take_along_axis(values, part, 1), axis=1, kind="stable")
        index = np.take_along_axis(part, order, 1)
        return Top(self.sample_ids[index], np.take_along_axis(self.values, index, 1))

    def to_csv(self, path: str | Path, k: int | None = None) -> None:
        """Write rows of query, rank, sample, score: the top k, or all."""
        top = self.top(k or len(self.sample_ids))
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["query", "rank", "sample", "score"])
            for query, samples, scores in zip(self.query_ids, *top, strict=True):
                for rank, (sample, score) in enumerate(zip(samples, scores, strict=True), 1):
                    writer.writerow([query, rank, sample, repr(float(score))])

    def to_parquet(self, path: str | Path) -> None:
        """Write all scores, a column per query. Needs the extra "parquet"."""
        import pandas

        columns = {f"query_{q}": row for q, row in zip(self.query_ids, self.values, strict=True)}
        pandas.DataFrame({"sample": self.sample_ids, **columns}).to_parquet(path)


def influence(
    log: RunLog,
    queries: str,
    method: str = "retrac",
    source: str = "train",
    *,
    client: Any = None,
    scheduler: Any = None,
) -> Scores:
    """Score every training sample's influence on every query (method.md; arXiv 2401.09031).

    A row of the training is set against the query's gradients at the snapshot nearest to its step.

    Args:
        log: the run.
        queries: name of a query set made with :func:`diffhook.query`.
        method: "tracin" or "retrac".
        source: "train" for the training's own events, "probe" for the grid at snapshots.
        client: a dask.distributed Client; otherwise threads of this process.
        scheduler: another dask scheduler.

    Raises:
        LogError: no such queries, or no rows.
        ConfigurationError: no such method or source.
    """
    chosen = find_method(method)
    table, asked = source_table(log, source), query_table(log, queries)
    query_ids, steps, directions = query_directions(asked, chosen)
    sample_ids = np.unique(table["sample"])
    task = _Score(chosen, sample_ids, steps, directions)

    def compute() -> npt.NDArray[np.float32]:
        found = scan(table, task, len(sample_ids), len(query_ids), client=client, scheduler=scheduler)
        return np.ascontiguousarray(found.T, dtype=np.float32)

    return Scores(query_ids, sample_ids, method, compute)


def query_directions(
    table: Table, method: Method
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Query ids (Q,), snapshot steps (K,), and Q_k[q] as (K, Q, D) float32."""
    ids, query = np.unique(table["sample"], return_inverse=True)
    steps, snapshot = np.unique(table["step"], return_inverse=True)
    weights = method.query_weights({c: table[c] for c in ("grad_norm", "weight")})
    directions = np.zeros((len(steps), len(ids), table.dim), np.float32)
    contributions = table["projection"].astype(np.float32) * weights[:, None]
    np.add.at(directions, (snapshot, query), contributions)
    return ids, steps, directions


@dataclass(frozen=True)
class _Score:
    """Scores the rows of one block against all queries."""

    method: Method
    sample_ids: npt.NDArray[np.int64]
    steps: npt.NDArray[np.int64]
    directions: npt.NDArray[np.float32]

    def __call__(self, table: Table, block: Block) -> Partial:
        columns = {c: table.read(block, c) for c in ("sample", "step", "lr", "weight", "grad_norm")}
        weights = self.method.row_weights(columns).astype(np.float32)
        projection = table.read(block, "projection").astype(np.float32)
        snapshot = nearest(columns["step"], self.steps)
        scores = np.zeros((len(projection), self.directions.shape[1]), np.float32)
        for k in np.unique(snapshot):
            rows = snapshot == k
            scores[rows] = projection[rows] @ self.directions[k].T * weights[rows, None]
        return sum_by_position(np.searchsorted(self.sample_ids, columns["sample"]), scores)
