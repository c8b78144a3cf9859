"""The timestep-induced bias, and what ReTrac does about it (arXiv 2401.09031, sections 4 and 5)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.stats

from diffhook.analysis.defaults import as_log
from diffhook.analysis.effective_dimension import EffectiveDimension, effective_dimension
from diffhook.analysis.execution import HERE, Execution
from diffhook.analysis.influence import influence
from diffhook.analysis.methods import COMPARED
from diffhook.analysis.scores import Scores
from diffhook.analysis.standardize import assign, bin_edges, looked_at
from diffhook.analysis.tables import loss_queries, query_table, source_table
from diffhook.errors import ConfigurationError, LogError
from diffhook.log import RunLog
from diffhook.log.store import Location
from diffhook.notebook import Displayed
from diffhook.words import apart, number, p_value, table

_BINS = 1000  # more make neither a table nor a chart


@dataclass(frozen=True)
class TimestepBin:
    """A column, such as the norm, of the rows in one range of timesteps."""

    low: float
    high: float
    rows: int
    median: float
    lower: float  # 10% quantile
    upper: float  # 90% quantile


@dataclass(frozen=True)
class Generality:
    """How alike the top-k of different queries are. Cardinality 1: all different.

    A random ranking has perfect cardinality: read it beside a measure of accuracy.
    """

    queries: str
    method: str
    source: str  # of the rows that were scored
    k: int
    cardinality: float  # see cardinality()
    general_samples: int  # in the top-k of more than general_share of the queries
    general_share: float


@dataclass(frozen=True)
class BiasReport(Displayed):
    """Diagnostics of one run."""

    source: str
    norms: list[TimestepBin]
    correlation: float  # Spearman: timestep drawn against gradient norm
    p_value: float
    generality: list[Generality]
    dimension: EffectiveDimension | None = None  # None without projections, or of sums of rows

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __repr__(self) -> str:
        edges = apart(edge for b in self.norms for edge in (b.low, b.high))
        bins = [
            (f"{low} – {high}", f"{b.rows:,}", number(b.median))
            for low, high, b in zip(edges[::2], edges[1::2], self.norms, strict=True)
        ]
        lines = [
            f"BiasReport of {self.source} rows: rank correlation of timestep and gradient norm "
            f"{self.correlation:+.2f}, {p_value(self.p_value)}".replace("-", "−"),
            table(("timesteps", "rows", "median norm"), bins),
        ]
        if self.generality:
            header = ("queries", "method", "top", "cardinality", "generally influential")
            tops = [
                (g.queries, g.method, str(g.k), f"{g.cardinality:.2f}", str(g.general_samples))
                for g in self.generality
            ]
            lines += ["", table(header, tops)]
        return "\n".join(lines + ([] if self.dimension is None else ["", str(self.dimension)]))


def bias(
    log: RunLog | Location,
    source: str | None = None,
    *,
    k: int = 10,
    general_share: float = 0.5,
    bins: int = 20,
    queries: Collection[str] | None = None,
    execution: Execution = HERE,
) -> BiasReport:
    """Norm against timestep, their rank correlation, how alike the queries' top-k are, and if D is enough.

    Norms are those of all rows, or of 2²¹, evenly spaced, where there are more.

    Args:
        log: the run; the last part needs query sets of two queries or more.
        source: "train" or "probe". By default norms are those of the training's own rows, if there are any,
            and scores are of the best source for each query set.
        k: size of each query's top.
        general_share: a sample is generally influential when it is in the top-k of more than this
            share of the queries.
        bins: number of timestep bins, of equal count.
        queries: names of the query sets to compare; None: all of the training loss.
        execution: as for :func:`diffhook.influence`.

    Raises:
        LogError: fewer than 3 finite rows.
        ConfigurationError: no bins, or an empty top.
    """
    for name, value in (("bins", bins), ("k", k)):
        if value < 1:
            raise ConfigurationError(f"{name} is {value}; expected at least 1")
    if bins > _BINS:
        raise ConfigurationError(f"bins is {bins}; expected at most {_BINS}")
    log = as_log(log)
    rows = source or ("train" if len(log.train) else "probe")
    table = source_table(log, rows, projected=False)
    norm, timestep = looked_at(table, ("grad_norm", "timestep")).values()
    usable = np.isfinite(norm) & np.isfinite(timestep)
    if usable.sum() < 3:
        raise LogError(f"{log.location} has {usable.sum()} usable {rows} rows; expected 3 or more")
    norm, timestep = norm[usable], timestep[usable]
    correlation, p_value = scipy.stats.spearmanr(timestep, norm)
    found = []
    for name in loss_queries(log) if queries is None else queries:
        if not table.dim or len(np.unique(query_table(log, name)["sample"])) < 2:
            continue
        for method in COMPARED:
            scores = influence(log, name, method, source, execution=execution)
            found.append(generality(scores, name, k, general_share))
    dimension = effective_dimension(log, source, execution=execution) if table.dim else None
    norms = timestep_bins(timestep, norm, bin_edges(timestep, bins))
    return BiasReport(rows, norms, float(correlation), float(p_value), found, dimension)


def timestep_bins(
    timestep: npt.NDArray[np.floating], values: npt.NDArray[np.floating], edges: npt.NDArray[np.float64]
) -> list[TimestepBin]:
    """Quantiles of the values in each bin of the timestep that has any."""
    position = assign(timestep, edges)
    result = []
    for index in np.unique(position):
        rows = values[position == index].astype(np.float64)
        lower, median, upper = np.quantile(rows, [0.1, 0.5, 0.9])
        high = edges[min(index + 1, len(edges) - 1)]
        result.append(TimestepBin(float(edges[index]), float(high), len(rows), float(median), lower, upper))
    return result


def generality(scores: Scores, name: str, k: int, general_share: float) -> Generality:
    """Cardinality and generally influential samples of a set of queries."""
    top = scores.top(k).sample_ids
    return Generality(
        queries=name,
        method=scores.method,
        source=scores.source,
        k=top.shape[1],
        cardinality=cardinality(top),
        general_samples=general_samples(top, general_share),
        general_share=general_share,
    )


def cardinality(top: npt.NDArray[np.int64]) -> float:
    """|union of the tops| / (queries × k) of (queries, k) ids: 1 where all differ, as in a random ranking."""
    return len(np.unique(top)) / top.size


def general_samples(top: npt.NDArray[np.int64], share: float) -> int:
    """How many samples are in more than a share of the (queries, k) tops."""
    counts = np.unique(top, return_counts=True)[1]
    return int((counts > share * len(top)).sum())
