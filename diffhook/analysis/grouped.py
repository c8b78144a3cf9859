"""Sums over the rows of each position (a sample, or a sample at a snapshot), in one pass.

Every block of rows gives a partial: a row of numbers for each position that it touches. Where the sums
of all positions fit into a share of the memory, those of neighbouring blocks are added up, and then
merged in a tree, which is no higher for a longer log. Where they do not, partials go to files, and the
positions are gathered part by part. Either way a block is read once, and the order of every sum is fixed:
by the log, not by the scheduler or its threads.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import scipy.sparse
from dask import delayed

from diffhook.analysis.execution import Execution
from diffhook.analysis.raw_arrays import mapped, publish
from diffhook.log import Block, Table

Partial = tuple[npt.NDArray[np.intp], npt.NDArray[np.float64]]  # positions (u,), values (u, width)
BlockSums = Callable[[Table, Block], Partial]

_ARITY = 4
_TASKS = 4**4  # at most so many tasks go over the blocks, each with one partial for all of its blocks
# Partials of the full size alive while sums are held whole: 3 wait on each of 4 levels of the tree, every
# thread has its own and what becomes of it, and malloc keeps the fragments of some.
_WAITING, _PER_THREAD, _FRAGMENTS = 3 * 4, 2, 4


class Reduction(Protocol):
    """What becomes of the sums; parts of positions one by one, then the results merged in order."""

    def reduce(self, start: int, values: npt.NDArray[np.float64]) -> Any:
        """The result for positions ``start`` … ``start + len(values)``."""
        ...

    def combine(self, results: list[Any]) -> Any:
        """The result for neighbouring parts, in order."""
        ...


@dataclass(frozen=True)
class Division:
    """How the positions are divided.

    Attributes:
        count, width: the sums are (count, width) float64.
        parts: in so many parts; 1: held whole.
        together: neighbouring positions that no part divides.
    """

    count: int
    width: int
    parts: int
    together: int = 1

    @classmethod
    def make(cls, count: int, width: int, execution: Execution, together: int = 1) -> Division:
        whole = cls(count, width, 1, together)
        if whole.memory(execution) <= execution.memory:
            return whole
        share = max(execution.memory // (4 * execution.workers), 1)
        return cls(count, width, min(-(-count * width * 8 // share), count // together), together)

    def memory(self, execution: Execution) -> int:
        """Bytes of sums alive at once in one process."""
        if self.parts == 1:
            partials = _WAITING + _PER_THREAD * execution.workers + _FRAGMENTS
            return self.count * self.width * 8 * partials
        return -(-self.count // self.parts) * self.width * 8 * execution.workers

    @property
    def bounds(self) -> list[tuple[int, int]]:
        groups = self.count // self.together
        edges = [groups * part // self.parts * self.together for part in range(self.parts + 1)]
        return list(pairwise(edges))


def grouped(
    table: Table,
    sums: BlockSums,
    plan: Division,
    reduction: Reduction,
    execution: Execution,
    title: str = "reading rows",
) -> Any:
    """The reduction of the sums over all rows of the table."""
    shared, task, rule = (delayed(value, traverse=False) for value in (table, sums, reduction))
    runs = _runs(list(table.blocks()))
    if not runs:
        return reduction.reduce(0, np.zeros((plan.count, plan.width)))
    if plan.parts == 1:
        partials = [delayed(_sum_run)(task, shared, delayed(run, traverse=False)) for run in runs]
        whole = _tree(partials, _merge)
        return execution.compute(delayed(_reduce_whole)(rule, whole, plan.count), title)
    with execution.scratch() as folder:
        files = [
            delayed(_spill_run)(task, shared, delayed(run, traverse=False), folder, index)
            for index, run in enumerate(runs)
        ]
        spilled = delayed(_joined)(files)
        parts = [delayed(_gather)(rule, spilled, start, stop, plan.width) for start, stop in plan.bounds]
        return execution.compute(_tree(parts, reduction.combine), title)


def add_rows(positions: npt.NDArray[Any], values: npt.NDArray[Any]) -> Partial:
    """Add up the rows of ``values`` that share a position."""
    order = np.argsort(positions, kind="stable")
    unique, counts = np.unique(positions, return_counts=True)
    ends = np.concatenate([[0], np.cumsum(counts)])
    # A sparse product: np.add.reduceat takes ten times as long along the first axis.
    which = scipy.sparse.csr_array((np.ones(len(order)), order, ends), shape=(len(unique), len(order)))
    return unique, np.asarray(which @ values.astype(np.float64))


def distinct_samples(table: Table, execution: Execution) -> npt.NDArray[np.int64]:
    """Ids of the samples in a table, ascending. Holds them, not the rows."""
    shared = delayed(table, traverse=False)
    runs = _runs(list(table.blocks()))
    if not runs:
        return np.empty(0, np.int64)
    layer = [delayed(_distinct_run)(shared, delayed(run, traverse=False)) for run in runs]
    found: npt.NDArray[np.int64] = execution.compute(_tree(layer, _distinct), "listing samples")
    return found


# ── tasks ─────────────────────────────────────────────────────────────────────────────────────────


def _runs(blocks: list[Block]) -> list[list[Block]]:
    size = max(-(-len(blocks) // _TASKS), 1)
    return [blocks[start : start + size] for start in range(0, len(blocks), size)]


def _tree(layer: list[Any], merge: Callable[[list[Any]], Any]) -> Any:
    while len(layer) > 1:
        layer = [delayed(merge)(layer[start : start + _ARITY]) for start in range(0, len(layer), _ARITY)]
    return layer[0]


def _sum_run(sums: BlockSums, table: Table, run: Sequence[Block]) -> Partial:
    found = sums(table, run[0])
    for block in run[1:]:
        found = _added(found, sums(table, block))
    return found


def _added(whole: Partial, part: Partial) -> Partial:
    """Their sum, in ``whole`` itself where that has all positions of ``part``."""
    positions, values = whole
    at = np.searchsorted(positions, part[0])
    if not len(positions) or (positions[np.minimum(at, len(positions) - 1)] != part[0]).any():
        return _merge([whole, part])
    values[at] += part[1]
    return whole


def _merge(partials: list[Partial]) -> Partial:
    if len(partials) == 1:
        return partials[0]
    positions = np.unique(np.concatenate([p for p, _ in partials]))
    values = np.zeros((len(positions), partials[0][1].shape[1]))
    for own, part in partials:
        values[np.searchsorted(positions, own)] += part
    return positions, values


def _reduce_whole(reduction: Reduction, partial: Partial, count: int) -> Any:
    positions, values = partial
    if len(positions) < count:
        whole = np.zeros((count, values.shape[1]))
        whole[positions] = values
        values = whole
    return reduction.reduce(0, values)


def _spill_run(sums: BlockSums, table: Table, run: Sequence[Block], folder: str, index: int) -> list[str]:
    names = []
    for number, block in enumerate(run):
        name = os.path.join(folder, f"{index:06d}-{number:04d}")
        positions, values = sums(table, block)
        publish(name + ".values", values.astype(np.float32))
        publish(name + ".positions", positions.astype(np.int64))
        names.append(name)
    return names


def _joined(names: list[list[str]]) -> list[str]:
    return [name for part in names for name in part]


def _gather(reduction: Reduction, names: list[str], start: int, stop: int, width: int) -> Any:
    values = np.zeros((stop - start, width))
    for name in names:
        positions = mapped(name + ".positions", np.int64)
        first, last = np.searchsorted(positions, [start, stop])
        if first < last:
            part = mapped(name + ".values", np.float32, width)
            values[positions[first:last] - start] += part[first:last]
    return reduction.reduce(start, values)


def _distinct_run(table: Table, run: Sequence[Block]) -> npt.NDArray[np.int64]:
    found = np.empty(0, np.int64)
    for block in run:
        found = np.union1d(found, table.read(block, "sample"))
    return found


def _distinct(parts: list[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    return np.unique(np.concatenate(parts)) if len(parts) > 1 else parts[0]
