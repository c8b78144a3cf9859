"""The second moment of a table's rows: in which directions gradients vary, from row to row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from diffhook.analysis.execution import Execution
from diffhook.analysis.grouped import Division, Partial, grouped
from diffhook.analysis.leave_outs import LeaveOuts
from diffhook.analysis.methods import Method
from diffhook.analysis.methods.whitening import blocks
from diffhook.log import Block, Table

Floats = npt.NDArray[np.floating[Any]]

ROWS = 1 << 17
"""Of more rows about so many are taken, drawn by their positions: D = 2048 numbers are estimated by 64 times
as many, and the pass costs no more however long the log is."""


def second_moment(
    table: Table, method: Method, execution: Execution, *, rows: int | None = None
) -> list[Floats]:
    """The mean over rows of φ_r φ_rᵀ with φ_r = norm_factor(‖g_r‖) · p_r, float64, as its square blocks along
    the diagonal; rows that the method weighs by 0 do not count.

    Args:
        rows: about so many are taken; None: :data:`ROWS`.
    """
    width = blocks(table.dim)[0].stop
    found = _held_whole(
        table, _Products(_Features.of(table, method, rows), width), table.dim, width, execution
    )
    return [found[part, : part.stop - part.start] for part in blocks(table.dim)]


def change_without(
    table: Table, method: Method, leave_outs: LeaveOuts, vectors: Floats, execution: Execution
) -> Floats:
    """(L, n, D) what leaving out draws adds to the second moment, times vectors (n, D)."""
    sums = _LeftOut(_Features.of(table, method), leave_outs, vectors)
    count = leave_outs.count * len(vectors)
    found = _held_whole(table, sums, count, table.dim, execution).reshape(leave_outs.count, *vectors.shape)
    change: Floats = found - found.mean(0)
    return change


def _held_whole(table: Table, sums: Any, count: int, width: int, execution: Execution) -> Floats:
    """Means over rows, (count, width), of sums whose last column is the number of rows. They do not grow with
    the log, and are not divided."""
    plan = Division.make(count, width + 1, execution, together=count)
    found: Floats = grouped(table, sums, plan, _Means(), execution, "relating dimensions")
    return found


class _Means:
    def reduce(self, start: int, values: npt.NDArray[np.float64]) -> Floats:
        return values[:, :-1] / np.maximum(values[:, -1:], 1)

    def combine(self, results: list[Floats]) -> Floats:
        return np.concatenate(results)


@dataclass(frozen=True)
class _Features:
    """φ of a share of a block's rows, (n, D) float32, and which rows they are."""

    method: Method
    share: float

    @classmethod
    def of(cls, table: Table, method: Method, rows: int | None = None) -> _Features:
        return cls(method, min((ROWS if rows is None else rows) / max(len(table), 1), 1.0))

    def __call__(self, table: Table, block: Block) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float32]]:
        columns = {c: table.read(block, c) for c in self.method.columns}
        chosen = self.method.row_weights(columns) != 0
        if self.share < 1:
            chosen &= np.random.default_rng((block.rank, block.start)).random(len(chosen)) < self.share
        features = table.read(block, "projection")[chosen].astype(np.float32)
        features *= self.method.norm_factor(columns["grad_norm"][chosen])[:, None]
        return chosen, features


@dataclass(frozen=True)
class _Products:
    """Block → for each dimension, Σ over rows of φ_r times its own part of φ_r, and the number of rows."""

    features: _Features
    width: int  # of the largest part

    def __call__(self, table: Table, block: Block) -> Partial:
        _, features = self.features(table, block)
        values = np.zeros((table.dim, self.width + 1))
        for part in blocks(table.dim):
            values[part, : part.stop - part.start] = features[:, part].T @ features[:, part]
        values[:, -1] = len(features)
        return np.arange(table.dim), values


@dataclass(frozen=True)
class _LeftOut:
    """Block → for each leave-out and vector, Σ over rows that are kept of ⟨φ_r, vector⟩ φ_r, part by part,
    and the number of rows."""

    features: _Features
    leave_outs: LeaveOuts
    vectors: Floats

    def __call__(self, table: Table, block: Block) -> Partial:
        chosen, features = self.features(table, block)
        kept = self.leave_outs.kept(table.read(block, "timestep"), table.read(block, "replicate"))[chosen]
        values = np.zeros((kept.shape[1], len(self.vectors), table.dim + 1))
        for part in blocks(table.dim):
            products = self.vectors[:, part].astype(np.float32) @ features[:, part].T
            for mine, rows in zip(values, kept.T, strict=True):
                mine[:, part] = products[:, rows] @ features[rows, part]
        values[:, :, -1] = kept.sum(0)[:, None]
        return np.arange(values.shape[0] * values.shape[1]), values.reshape(-1, table.dim + 1)
