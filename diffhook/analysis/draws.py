"""How far other draws of noise would move the scores, on both sides.

Queries hold R replicates of their noise. On a grid the training side holds the same ones, so that leaving
one out leaves it out on both sides: the jackknife √((R−1)/R · Σ_r (s_−r − mean)²), averaged where replicates
are paired over timesteps in several ways, see :mod:`diffhook.analysis.leave_outs`. The training's own rows
each drew noise and timestep by themselves: of n rows near a snapshot, a score's part there has n times the
variance of what a row adds. Both are independent of each other, and add up. What a method makes of all
samples is held fixed, but for the second moment of a grid's rows, which the shared draws move too
(:func:`~diffhook.analysis.second_moment.change_without`), and for the share of the training side's variance
that whitening by means lets through (:meth:`~diffhook.analysis.methods.Method.variance_share`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from diffhook.analysis.execution import Execution
from diffhook.analysis.grouped import Division, Partial, Reduction, add_rows
from diffhook.analysis.leave_outs import LeaveOuts
from diffhook.analysis.row_scores import RowScores
from diffhook.log import Block, Table

Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Draws:
    """What is known of the draws.

    Attributes:
        leave_outs: L of them; None: the queries' noise was drawn once.
        without: (L, K, C, Q, D) float32: the queries' directions in each of them; None likewise.
        paired: whether the training side holds the same replicates.
        by_row: whether each row of the training side is a draw of its own.
        variance_share: () → (K,) of the variance of rows, what counts; called when errors are asked for.
    """

    leave_outs: LeaveOuts | None
    without: npt.NDArray[np.float32] | None
    paired: bool
    by_row: bool
    variance_share: Callable[[], Floats]


class DrawLayout(NamedTuple):
    """How sums over draws lie: sample by sample ``groups`` rows of 1 + 2 Q + L · Q numbers.

    Attributes:
        leave_outs: L of them; None where noise was drawn once.
        groups: sums of a sample's rows that are kept apart: those near each snapshot where rows are draws.
        by_row, paired: see :class:`Draws`.
    """

    queries: int
    leave_outs: LeaveOuts | None
    groups: int
    by_row: bool
    paired: bool

    @property
    def width(self) -> int:
        return 1 + self.queries * (2 + (0 if self.leave_outs is None else self.leave_outs.count))

    def of_samples(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """(n, groups, width)."""
        return values.reshape(len(values) // self.groups, self.groups, -1)

    def without(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """(n, L · Q) the scores in each leave-out."""
        found: npt.NDArray[np.float64] = self.of_samples(values)[:, :, 1 + 2 * self.queries :].sum(1)
        return found


class Uncertainty(NamedTuple):
    """Of scores: their standard errors, and how many degrees of freedom these are estimated with."""

    error: Floats
    dof: Floats


class DrawSums:
    """Block → per sample (and snapshot, where rows are draws): number of rows, Σ s, Σ s², Σ s in each
    leave-out, of what rows add to the scores."""

    def __init__(self, rows: RowScores, draws: Draws) -> None:
        queries, snapshots = rows.queries, len(rows.steps)
        parts = [rows.directions, *([] if draws.without is None else draws.without)]
        self.rows = replace(rows, directions=np.concatenate(parts, axis=2))
        self.paired = draws.paired
        groups = snapshots if draws.by_row else 1
        self.layout = DrawLayout(queries, draws.leave_outs, groups, draws.by_row, draws.paired)

    def plan(self, execution: Execution) -> Division:
        groups = self.layout.groups
        return Division.make(
            len(self.rows.sample_ids) * groups, self.layout.width, execution, together=groups
        )

    def __call__(self, table: Table, block: Block) -> Partial:
        sample, snapshot, scores = self.rows.of_rows(table, block)
        whole, without = np.split(scores, [self.layout.queries], axis=1)
        if self.paired:
            without = self._left_out(table, block, without)
        usable = whole.any(1)
        values = np.column_stack([usable, whole, np.square(whole, dtype=np.float64), without])
        groups = self.layout.groups
        return add_rows(sample if groups == 1 else sample * groups + snapshot, values)

    def _left_out(self, table: Table, block: Block, without: Floats) -> Floats:
        """A row counts for nothing without its replicate, and for R/(R − 1) without another."""
        leave_outs = self.layout.leave_outs
        assert leave_outs is not None
        kept = leave_outs.kept(table.read(block, "timestep"), table.read(block, "replicate"))
        factor = leave_outs.replicates / (leave_outs.replicates - 1)
        return without * np.repeat(kept * factor, self.layout.queries, axis=1)


@dataclass(frozen=True)
class Spread:
    """The uncertainty of all scores, or of those at some positions ``at`` (Q, k) of each query."""

    layout: DrawLayout
    share: Floats  # (K,), see Draws.variance_share
    at: npt.NDArray[np.intp] | None = None

    def reduce(self, start: int, values: npt.NDArray[np.float64]) -> Uncertainty:
        layout = self.layout
        variances, freedoms = [], []
        if layout.leave_outs is not None:
            without = layout.without(values)
            shaped = without.reshape(len(without), layout.leave_outs.count, layout.queries)
            share = self.share.mean() if layout.paired else 1.0  # of draws that moved the kernel, too
            variances.append(layout.leave_outs.variance(shaped) * share)
            freedoms.append(np.full_like(variances[-1], layout.leave_outs.freedom))
        if layout.by_row:
            sums = layout.of_samples(values)[:, :, : 1 + 2 * layout.queries]
            count, total, squares = np.split(sums, [1, 1 + layout.queries], axis=2)
            variance, freedom = _of_rows(count, total, squares, self.share[:, None])
            variances.append(variance)
            freedoms.append(np.broadcast_to(freedom, variance.shape))
        variance, freedom = _added(variances, freedoms)
        return self._chosen(start // layout.groups, Uncertainty(np.sqrt(variance).T, freedom.T))

    def _chosen(self, start: int, found: Uncertainty) -> Uncertainty:
        if self.at is None:
            return Uncertainty(*(np.ascontiguousarray(values, dtype=np.float32) for values in found))
        here = (self.at >= start) & (self.at < start + found.error.shape[1])
        mine = np.where(here, self.at - start, 0)
        chosen = (np.take_along_axis(values, mine, 1).astype(np.float32) for values in found)
        return Uncertainty(*(np.where(here, values, np.float32(0)) for values in chosen))

    def combine(self, results: list[Uncertainty]) -> Uncertainty:
        if self.at is None:
            return Uncertainty(*(np.concatenate(parts, axis=1) for parts in zip(*results, strict=True)))
        return Uncertainty(*(np.sum(parts, axis=0) for parts in zip(*results, strict=True)))


@dataclass(frozen=True)
class Without:
    """Another reduction, of the scores in each leave-out: (positions, L · Q)."""

    layout: DrawLayout
    inner: Reduction

    def reduce(self, start: int, values: npt.NDArray[np.float64]) -> Any:
        return self.inner.reduce(start // self.layout.groups, self.layout.without(values))

    def combine(self, results: list[Any]) -> Any:
        return self.inner.combine(results)


def _of_rows(count: Floats, total: Floats, squares: Floats, share: Floats) -> tuple[Floats, Floats]:
    """(n, Q) variance of the sum over rows, and (n, 1) its degrees of freedom.

    A snapshot with one row has the mean variance of a row at the others. Where no snapshot has two, rows
    are compared across snapshots; of a single row nothing is known (NaN).

    Args:
        count, total, squares: (n, K, 1) rows, (n, K, Q) Σ s and Σ s².
        share: (K, 1) of the variance, what counts.
    """
    freedom = np.maximum(count - 1, 0)
    scatter = np.maximum(squares - np.square(total) / np.maximum(count, 1), 0)
    across = freedom.sum(1, keepdims=True) == 0  # (n, 1, 1)
    rows = count.sum(1, keepdims=True)
    over_all = squares.sum(1, keepdims=True) - np.square(total.sum(1, keepdims=True)) / np.maximum(rows, 1)
    free = np.where(across, np.maximum(rows - 1, 0), freedom.sum(1, keepdims=True))
    pooled = np.where(across, np.maximum(over_all, 0), scatter.sum(1, keepdims=True))
    of_row = np.divide(pooled, free, out=np.full(pooled.shape, np.nan), where=free > 0)
    own = np.divide(scatter, freedom, out=np.broadcast_to(of_row, scatter.shape).copy(), where=freedom > 0)
    return np.where(count > 0, count * share * own, 0.0).sum(1), free[:, 0]


def _added(variances: list[Floats], freedoms: list[Floats]) -> tuple[Floats, Floats]:
    """Their sum, with Welch and Satterthwaite's degrees of freedom."""
    total = np.sum(variances, axis=0)
    parts = [v * v / np.maximum(f, 1) for v, f in zip(variances, freedoms, strict=True)]
    found = np.divide(total * total, np.sum(parts, axis=0), out=np.ones_like(total), where=total > 0)
    return total, found
