"""The training side by itself: sums over each sample's rows at each snapshot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from diffhook.analysis.execution import Execution
from diffhook.analysis.grouped import Division, Partial, Reduction, add_rows, grouped
from diffhook.analysis.methods import Method, SampleSums
from diffhook.analysis.methods.method import reciprocal
from diffhook.analysis.methods.whitening import blocks
from diffhook.analysis.second_moment import second_moment
from diffhook.analysis.tables import loss_table, nearest
from diffhook.errors import LogError
from diffhook.log import Block, RunLog, Table

Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class SampleRows:
    """Block → per snapshot and sample: Σ ω, number of usable rows, Σ ω · norm_factor · p (D numbers).

    Position k · N + i: a part of the positions belongs to few snapshots. Rows of other samples are left out.
    """

    method: Method
    sample_ids: npt.NDArray[np.int64]
    steps: npt.NDArray[np.int64]

    def __call__(self, table: Table, block: Block) -> Partial:
        columns = {c: table.read(block, c) for c in ("sample", "step", *self.method.columns)}
        projection = table.read(block, "projection")
        mine = np.isin(columns["sample"], self.sample_ids)
        if not mine.all():
            columns, projection = {c: values[mine] for c, values in columns.items()}, projection[mine]
        weights = self.method.row_weights(columns)
        projection = projection.astype(np.float32)
        projection *= weights[:, None].astype(np.float32)
        usable = weights != 0
        rates = np.where(usable, self.method.rates(columns), 0.0)
        values = np.column_stack([rates.astype(np.float32), usable, projection])
        sample = np.searchsorted(self.sample_ids, columns["sample"])
        position = nearest(columns["step"], self.steps) * len(self.sample_ids) + sample
        return add_rows(position, values)


def reduce_samples(
    table: Table, rows: SampleRows, reduction: Reduction, execution: Execution, title: str
) -> Any:
    """The reduction of the sums that :class:`SampleRows` makes, in one pass over the table."""
    plan = Division.make(len(rows.sample_ids) * len(rows.steps), table.dim + 2, execution)
    return grouped(table, rows, plan, reduction, execution, title)


def sample_sums(
    log: RunLog,
    table: Table,
    method: Method,
    sample_ids: npt.NDArray[np.int64],
    steps: npt.NDArray[np.int64],
    execution: Execution,
) -> SampleSums:
    """What the method requires of the training samples before they are scored."""
    needed, shape = method.requires, (len(steps), len(sample_ids))
    if needed & {"norm", "grams"}:
        rule = _Summary(len(sample_ids), "grams" in needed)
        rows = SampleRows(method, sample_ids, steps)
        found: _Found = reduce_samples(table, rows, rule, execution, "summing up samples")
        sums = SampleSums(found.rate.reshape(shape), found.norm.reshape(shape), found.grams)
    else:
        rates = _Rates(method, sample_ids, steps)
        plan = Division.make(shape[0] * shape[1], 1, execution)
        sums = SampleSums(grouped(table, rates, plan, Whole(), execution, "counting rows").reshape(shape))
    if "moment" in needed:
        sums = replace(sums, moment=second_moment(table, method, execution))
    if "residual" in needed:
        sums = replace(sums, residual=_residuals(log, sample_ids, execution))
    return sums


@dataclass(frozen=True)
class _Rates:
    """Block → per snapshot and sample Σ ω, at the positions of :class:`SampleRows`."""

    method: Method
    sample_ids: npt.NDArray[np.int64]
    steps: npt.NDArray[np.int64]

    def __call__(self, table: Table, block: Block) -> Partial:
        columns = {c: table.read(block, c) for c in ("sample", "step", *self.method.columns)}
        rates = np.where(self.method.row_weights(columns) != 0, self.method.rates(columns), 0.0)
        sample = np.searchsorted(self.sample_ids, columns["sample"])
        return add_rows(nearest(columns["step"], self.steps) * len(self.sample_ids) + sample, rates[:, None])


class _Found(NamedTuple):
    rate: Floats
    norm: Floats
    grams: dict[int, list[Floats]] | None  # of the snapshots that a part has rows of


@dataclass(frozen=True)
class _Summary:
    samples: int
    with_grams: bool

    def reduce(self, start: int, values: npt.NDArray[np.float64]) -> _Found:
        rate, vectors = values[:, 0], values[:, 2:]
        norm = np.linalg.norm(vectors, axis=1)
        if not self.with_grams:
            return _Found(rate.copy(), norm, None)
        snapshot = (start + np.arange(len(values))) // self.samples
        grams = {}
        for k in np.unique(snapshot[rate > 0]).tolist():
            mine = (snapshot == k) & (rate > 0)
            features = vectors[mine] / rate[mine, None]
            grams[k] = [features[:, part].T @ features[:, part] for part in blocks(features.shape[1])]
        return _Found(rate.copy(), norm, grams)

    def combine(self, results: list[_Found]) -> _Found:
        grams: dict[int, list[Floats]] = {}
        for found in results:
            for k, parts in (found.grams or {}).items():
                known = grams.get(k)
                grams[k] = parts if known is None else [a + b for a, b in zip(known, parts, strict=True)]
        rate, norm = (np.concatenate(parts) for parts in zip(*(found[:2] for found in results), strict=True))
        return _Found(rate, norm, grams if self.with_grams else None)


@dataclass(frozen=True)
class SampleMeans:
    """Block → per sample Σ and count of the finite values that ``column`` makes of a block's columns."""

    sample_ids: npt.NDArray[np.int64]
    column: Callable[[Table, Block], Floats]

    def __call__(self, table: Table, block: Block) -> Partial:
        values = self.column(table, block).astype(np.float64)
        sample = table.read(block, "sample")
        known = np.isfinite(values) & np.isin(sample, self.sample_ids)
        position = np.searchsorted(self.sample_ids, sample[known])
        return add_rows(position, np.column_stack([values[known], np.ones(known.sum())]))


class Whole:
    """The sums themselves."""

    def reduce(self, start: int, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return values

    def combine(self, results: list[npt.NDArray[np.float64]]) -> npt.NDArray[np.float64]:
        return np.concatenate(results)


def _residuals(log: RunLog, sample_ids: npt.NDArray[np.int64], execution: Execution) -> Floats:
    """(N,) mean of √loss over √ of the mean loss, of the rows that tell one.

    Raises:
        LogError: there is none for some sample.
    """
    table = loss_table(log)
    plan = Division.make(len(sample_ids), 2, execution)
    losses, roots = (
        grouped(table, SampleMeans(sample_ids, column), plan, Whole(), execution, "reading losses")
        for column in (_losses, _root_losses)
    )
    unknown = sample_ids[losses[:, 1] == 0]
    if len(unknown):
        raise LogError(
            f"{len(unknown)} samples (such as {unknown[0]}) have no loss in {log.location}, which the "
            "residual needs: probe them with the training's loss"
        )
    found: Floats = roots[:, 0] * reciprocal(np.sqrt(losses[:, 0] * losses[:, 1]))
    return found


def _losses(table: Table, block: Block) -> Floats:
    return table.read(block, "loss")


def _root_losses(table: Table, block: Block) -> Floats:
    return np.sqrt(table.read(block, "loss").clip(0))
