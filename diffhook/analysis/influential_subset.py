"""Which samples together made this one: those whose removal, all at once, would cost a query most.

Scores of single samples do not add up. Near copies stand in for each other: each alone is worth little, for
the model has the others, and only without all of them a query fares worse. So samples are chosen one after
the other, each by what it takes from the query once those before it are gone (adaptive greedy selection, Hu
et al. 2024, arXiv 2409.18153). Without the samples S of a training on rows φ_r,

    effect(S) = mean_k φ_q λ (G_S + λI)⁻¹ Σ_{i in S} φ_i,   G_S = G − 1/R Σ over the rows of S of φ_r φ_rᵀ

with G and λ of whitened ReTrac, R rows in all, and φ_i the mean of a sample's rows at snapshot k: what ridge
regression loses without S, which it then lacks in its matrix, too. For one sample, and with G in place of
G_S, this is whitened ReTrac's score, whitened on one side.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import scipy.linalg

from diffhook.analysis import second_moment
from diffhook.analysis.defaults import as_log
from diffhook.analysis.execution import HERE, Execution
from diffhook.analysis.grouped import Division, Partial, add_rows, grouped
from diffhook.analysis.influence import PreparedScoring, prepare
from diffhook.analysis.methods import Method, WhitenedReTrac
from diffhook.analysis.methods.method import reciprocal
from diffhook.analysis.methods.whitening import blocks
from diffhook.analysis.remaining import Remaining
from diffhook.analysis.sample_sums import Whole
from diffhook.analysis.scores import Top, checked_size
from diffhook.analysis.tables import check_query_name, nearest
from diffhook.log import Block, RunLog, Table
from diffhook.log.store import Location

Floats = npt.NDArray[np.floating[Any]]

_POOL = 100  # the least number of candidates
_BINS = 16  # of timesteps, in each of which a sample's rows at a snapshot are taken together


@dataclass(frozen=True, repr=False)
class Subset(Top):
    """For each query k samples that together made it, in the order in which they were chosen.

    Attributes:
        scores: (Q, k) float32: what each adds to the effect of leaving out those before it.
    """

    title: ClassVar[str] = "Subsets of {} for"

    @property
    def effects(self) -> npt.NDArray[np.float32]:
        """(Q,) of leaving out all of them."""
        found: npt.NDArray[np.float32] = self.scores.sum(1)
        return found


def influential_subset(
    log: RunLog | Location,
    queries: str,
    k: int,
    source: str | None = None,
    *,
    pool: int | None = None,
    execution: Execution = HERE,
) -> Subset:
    """The k samples whose removal, all at once, would cost each query most.

    Chosen greedily (arXiv 2409.18153) by the kernel of whitened ReTrac, in some seconds a query.

    Args:
        log, queries, source: as for :func:`diffhook.influence`.
        pool: candidates of each query: so many of the highest scores by whitened ReTrac; by default
            four times k, and at least 100.
        execution: where it runs, how much memory it may take, and whether it shows its progress.

    Raises:
        LogError, ConfigurationError: as :func:`diffhook.influence`; and k < 1, or a pool of fewer than k.
    """
    checked_size("k", k)
    pool = max(_POOL, 4 * k) if pool is None else pool
    checked_size("pool", pool, k)
    check_query_name(queries)
    log = as_log(log)
    method = WhitenedReTrac()
    prepared = _with_every_row(prepare(log, queries, method, source, execution), execution)
    candidates = prepared.pass_.top(pool, False).sample_ids
    chosen = [
        found
        for some in _groups(candidates, _Rows.numbers(prepared) * 16, execution)
        for found in _chosen(prepared, method, candidates[some], some, k, execution)
    ]
    ids, gains = (np.stack(parts) for parts in zip(*chosen, strict=True))
    return Subset(ids, gains.astype(np.float32), prepared.query_ids, log.names(), log.thumbnails)


def _with_every_row(prepared: PreparedScoring, execution: Execution) -> PreparedScoring:
    """With G of all rows, not of a share of them: a sample can be taken from G only if all of it is in G."""
    table = prepared.pass_.table
    if len(table) <= second_moment.ROWS:
        return prepared
    moment = second_moment.second_moment(table, prepared.method, execution, rows=len(table))
    assert prepared.sums is not None
    return replace(prepared, sums=replace(prepared.sums, moment=moment))


def _groups(candidates: npt.NDArray[Any], size: int, execution: Execution) -> list[npt.NDArray[np.intp]]:
    """Queries whose candidates' rows fit into memory together, where each candidate takes ``size`` bytes."""
    needed = len(np.unique(candidates)) * size
    parts = min(-(-needed // execution.memory), len(candidates))
    return np.array_split(np.arange(len(candidates)), max(parts, 1))


def _chosen(
    prepared: PreparedScoring,
    method: WhitenedReTrac,
    candidates: npt.NDArray[np.int64],
    queries: npt.NDArray[np.intp],
    k: int,
    execution: Execution,
) -> Iterator[tuple[npt.NDArray[np.int64], Floats]]:
    """Of each query (k,) ids and what they add. Candidates: (Q, C)."""
    samples = np.unique(candidates)
    rows = _Rows.gathered(prepared, samples, execution)
    directions = prepared.directions.whole[:, :, queries]
    asked = directions.reshape(-1, *directions.shape[2:]).swapaxes(0, 1)  # (Q, P, D)
    asked = rows.whiten(asked, prepared, method.ridge)
    for own, mine in zip(candidates, asked, strict=True):
        at = np.searchsorted(samples, own)
        vectors, shares = rows.vectors[at], rows.shares[at]
        remaining = []
        for part in blocks(vectors.shape[2]):
            of_block = np.ascontiguousarray(vectors[:, :, part])
            remaining.append(Remaining(of_block, of_block @ mine[:, part].T, shares.copy()))
        order, gains = _greedy(remaining, min(k, len(own)))
        yield own[order], gains


def _greedy(remaining: list[Remaining], k: int) -> tuple[npt.NDArray[np.intp], Floats]:
    """(k,) positions of candidates and what each adds, strongest first."""
    order: list[int] = []
    added = []
    for _ in range(k):
        gains = np.sum([block.gains() for block in remaining], 0)
        gains[order] = -np.inf
        order.append(int(np.argmax(gains)))
        added.append(gains[order[-1]])
        for block in remaining:
            block.leave_out(order[-1])
    return np.array(order), np.array(added)


@dataclass
class _Rows:
    """Rows of U samples, T of each.

    Those of a snapshot and of neighbouring timesteps are taken together, n of them as √n times their mean,
    which leaves no more out of G than they do.

    Attributes:
        vectors: (U, T, D) float32.
        shares: (U, T, P) float64, see :class:`~diffhook.analysis.remaining.Remaining`.
    """

    vectors: npt.NDArray[np.float32]
    shares: Floats

    @staticmethod
    def numbers(prepared: PreparedScoring) -> int:
        """How many a sample's vectors may be."""
        return len(prepared.directions.steps) * _BINS * prepared.pass_.table.dim

    @classmethod
    def gathered(
        cls, prepared: PreparedScoring, samples: npt.NDArray[np.int64], execution: Execution
    ) -> _Rows:
        table, rows = prepared.pass_.table, prepared.pass_.rows
        steps, centres = rows.steps, rows.centres
        bins = _Bins.of(table)
        cells = len(steps) * len(bins)
        plan = Division.make(len(samples) * cells, table.dim + 1, execution)
        task = _Gathering(prepared.method, samples, steps, bins)
        sums = grouped(table, task, plan, Whole(), execution, "reading rows of candidates")
        counts = sums[:, -1].reshape(len(samples), cells)
        vectors = (sums[:, :-1] * reciprocal(np.sqrt(sums[:, -1:]))).astype(np.float32)
        assert prepared.sums is not None
        rate = prepared.sums.rate[:, np.searchsorted(rows.sample_ids, samples)]  # (K, U)
        snapshot = np.arange(cells) // len(bins)
        centre = np.tile(nearest(bins.middles, centres), len(steps))
        shares = np.zeros((len(samples), cells, len(steps) * len(centres)))
        shares[:, np.arange(cells), snapshot * len(centres) + centre] = (
            np.sqrt(counts) * reciprocal(rate).T[:, snapshot] / len(steps)
        )
        return cls(vectors.reshape(len(samples), cells, -1), shares)

    def whiten(self, asked: Floats, prepared: PreparedScoring, ridge: float) -> Floats:
        """Multiply the vectors by A^(−1/2) / √R. Returns the queries' (Q, P, D), times A^(−1/2) · λ √R."""
        assert prepared.sums is not None
        assert prepared.sums.moment is not None
        moment, count = prepared.sums.moment, prepared.sums.rate.sum()
        level = ridge * sum(map(np.trace, moment)) / asked.shape[2]
        found = np.zeros(asked.shape)
        for part, gram in zip(blocks(asked.shape[2]), moment, strict=True):
            own = ridge * np.trace(gram) / len(gram)
            if not own > 0:
                self.vectors[:, :, part] = 0
                continue
            root = np.linalg.cholesky(gram + own * np.eye(len(gram)))
            for vectors, target, factor in (
                (self.vectors, self.vectors, 1 / np.sqrt(count)),
                (asked, found, level * np.sqrt(count)),
            ):
                flat = vectors[:, :, part].reshape(-1, len(gram)).T
                solved = scipy.linalg.solve_triangular(root.astype(flat.dtype), flat, lower=True).T
                target[:, :, part] = factor * solved.reshape(target[:, :, part].shape)
        return found


@dataclass(frozen=True)
class _Bins:
    """Of timesteps: one for each of a few timesteps, else of as many timesteps each.

    Attributes:
        edges: between bins, ascending; one less than bins.
        middles: of the bins.
    """

    edges: Floats
    middles: Floats

    def __len__(self) -> int:
        return len(self.middles)

    @classmethod
    def of(cls, table: Table) -> _Bins:
        told = np.unique(np.nan_to_num(table["timestep"].astype(np.float64)))
        if len(told) <= _BINS:
            return cls((told[1:] + told[:-1]) / 2, told)
        *found, _ = np.quantile(told, np.arange(1, 2 * _BINS + 1) / (2 * _BINS))
        return cls(np.array(found[1::2]), np.array(found[::2]))

    def at(self, timesteps: Floats) -> npt.NDArray[np.intp]:
        """(rows,) the bins of timesteps."""
        return np.searchsorted(self.edges, np.nan_to_num(timesteps))


@dataclass(frozen=True)
class _Gathering:
    """Block → for each sample, snapshot and bin of timesteps Σ φ_r and the number of rows."""

    method: Method
    samples: npt.NDArray[np.int64]
    steps: npt.NDArray[np.int64]
    bins: _Bins

    def __call__(self, table: Table, block: Block) -> Partial:
        columns = {c: table.read(block, c) for c in ("sample", "step", "timestep", *self.method.columns)}
        mine = np.isin(columns["sample"], self.samples) & (self.method.row_weights(columns) != 0)
        columns = {c: values[mine] for c, values in columns.items()}
        features = np.ones((mine.sum(), table.dim + 1), np.float32)
        if mine.any():
            features[:, :-1] = table.read(block, "projection")[mine]
        sample = np.searchsorted(self.samples, columns["sample"])
        place = sample * len(self.steps) + nearest(columns["step"], self.steps)
        return add_rows(place * len(self.bins) + self.bins.at(columns["timestep"]), features)
