"""Which timesteps of the training rows carried an influence."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from diffhook.analysis.defaults import as_log
from diffhook.analysis.execution import HERE, Execution
from diffhook.analysis.grouped import Division, Partial, grouped
from diffhook.analysis.influence import prepare
from diffhook.analysis.methods import Method
from diffhook.analysis.row_scores import RowScores
from diffhook.analysis.sample_sums import Whole
from diffhook.analysis.tables import check_query_name, nearest, source_table
from diffhook.errors import ConfigurationError
from diffhook.log import Block, RunLog, Table
from diffhook.log.store import Location


@dataclass(frozen=True)
class TimestepInfluence:
    """Influence by the timestep of the training row.

    Attributes:
        values: (Q, k, bins) float32; summed over bins, the scores.
        edges: (bins + 1,) float64, of equal width over the timesteps of the rows.
    """

    values: npt.NDArray[np.float32]
    edges: npt.NDArray[np.float64]


def influence_by_timestep(
    log: RunLog | Location,
    queries: str,
    sample_ids: npt.ArrayLike,
    method: str | Method | None = None,
    source: str | None = None,
    *,
    bins: int = 20,
    execution: Execution = HERE,
) -> TimestepInfluence:
    """Divide the influence of some samples on each query among timesteps.

    Args:
        log, queries, method, source: as for :func:`diffhook.influence`.
        sample_ids: (Q, k), such as ``influence(...).top(k).sample_ids``.
        bins: number of timestep bins.
        execution: as for :func:`diffhook.influence`.

    Raises:
        LogError, ConfigurationError: as :func:`diffhook.influence`; or sample_ids do not fit.
    """
    check_query_name(queries)
    log = as_log(log)
    prepared = prepare(log, queries, method, source, execution)
    source_table(log, prepared.source)  # raises for a log of sums over timesteps
    asked = np.asarray(sample_ids, np.int64)
    count = len(prepared.query_ids)
    if bins < 1:
        raise ConfigurationError(f"bins is {bins}; expected at least 1")
    if asked.ndim != 2 or len(asked) != count:
        raise ConfigurationError(
            f"sample_ids has shape {asked.shape}; expected ({count}, k), a row per query"
        )
    rows, table = prepared.pass_.rows, prepared.pass_.table
    unknown = np.setdiff1d(asked, rows.sample_ids)
    if len(unknown):
        raise ConfigurationError(f"sample {unknown[0]} has no rows in source {prepared.source!r}")
    edges = np.linspace(*_span(table), bins + 1)
    plan = Division(asked.size * bins, 1, 1)
    sums = grouped(table, _Binned(rows, asked, edges), plan, Whole(), execution, "scoring timesteps")
    return TimestepInfluence(sums.reshape(*asked.shape, bins).astype(np.float32), edges)


def _span(table: Table) -> tuple[float, float]:
    low, high = np.inf, -np.inf
    for block in table.blocks():
        timestep = table.read(block, "timestep")
        finite = timestep[np.isfinite(timestep)]
        low, high = min(low, finite.min(initial=np.inf)), max(high, finite.max(initial=-np.inf))
    return (low, high) if low < high else (0.0, max(high, 1.0))


@dataclass(frozen=True)
class _Binned:
    """Block → position (q · k + j) · bins + bin: the scores of the rows of sample_ids[q, j]."""

    rows: RowScores
    asked: npt.NDArray[np.int64]
    edges: npt.NDArray[np.float64]

    def __call__(self, table: Table, block: Block) -> Partial:
        rows, bins = self.rows, len(self.edges) - 1
        sample = table.read(block, "sample")
        wanted = np.flatnonzero(np.isin(sample, self.asked))
        if not len(wanted):
            return np.empty(0, np.intp), np.empty((0, 1))
        columns = {c: table.read(block, c)[wanted] for c in rows.columns}
        snapshot, centre = nearest(columns["step"], rows.steps), rows.centre(columns)
        weights = rows.weights(columns, np.searchsorted(rows.sample_ids, columns["sample"]), snapshot)
        timestep = np.nan_to_num(columns["timestep"], nan=self.edges[0])
        place = np.searchsorted(self.edges, timestep, side="right").clip(1, bins) - 1
        projection = table.read(block, "projection")[wanted].astype(np.float32)
        sums = np.zeros((*self.asked.shape, bins))
        for query, mine in enumerate(self.asked):
            for column, wanted_sample in enumerate(mine):
                own = columns["sample"] == wanted_sample
                if own.any():
                    against = rows.directions[snapshot[own], centre[own], query]
                    products = np.einsum("rd,rd->r", projection[own], against, dtype=np.float64)
                    np.add.at(sums[query, column], place[own], products * weights[own])
        touched = np.flatnonzero(sums.reshape(-1))
        return touched, sums.reshape(-1, 1)[touched]
