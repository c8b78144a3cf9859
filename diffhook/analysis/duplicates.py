"""Near-duplicates by the cosine of aggregated projections: exact and out of core, or by FAISS."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from dask import delayed

from diffhook.analysis.defaults import as_log
from diffhook.analysis.execution import HERE, Execution
from diffhook.analysis.grouped import distinct_samples
from diffhook.analysis.inverted_lists import nearest_by_faiss
from diffhook.analysis.methods import ReTrac
from diffhook.analysis.raw_arrays import allocate, fill, mapped
from diffhook.analysis.sample_sums import SampleRows, reduce_samples
from diffhook.analysis.tables import source_table
from diffhook.errors import ConfigurationError
from diffhook.log import RunLog, Table
from diffhook.log.samples import sample_words
from diffhook.log.store import Location
from diffhook.notebook import Displayed
from diffhook.words import plural, table

_SHOWN = 10  # pairs of a repr
_TILE = 2048  # samples against as many


@dataclass(frozen=True)
class Neighbours(Displayed):
    """Every sample's nearest other sample.

    Attributes:
        sample_ids: (N,) int64, ascending.
        neighbours: (N,) int64, ids; of equals, the lower.
        cosines: (N,) float32; NaN for a sample without a usable gradient.
        names: id → name, of samples that have one.
        thumbnails: id → PNG, where the log keeps them: what a notebook shows.
    """

    sample_ids: npt.NDArray[np.int64]
    neighbours: npt.NDArray[np.int64]
    cosines: npt.NDArray[np.float32]
    names: Mapping[int, str] = field(default_factory=dict)
    thumbnails: Mapping[int, bytes] = field(default_factory=dict)

    def closest(self, k: int) -> list[tuple[int, int, float]]:
        """The k pairs of highest cosine, each once: (sample, its neighbour, cosine), closest first."""
        order = np.argsort(-np.nan_to_num(self.cosines, nan=-np.inf), kind="stable")
        pairs: dict[frozenset[int], tuple[int, int, float]] = {}
        for i in order[~np.isnan(self.cosines[order])]:
            sample, other = int(self.sample_ids[i]), int(self.neighbours[i])
            pairs.setdefault(frozenset((sample, other)), (sample, other, float(self.cosines[i])))
            if len(pairs) == k:
                break
        return list(pairs.values())

    def __repr__(self) -> str:
        rows = [
            (sample_words(sample, self.names), sample_words(other, self.names), f"{cosine:.3f}")
            for sample, other, cosine in self.closest(_SHOWN)
        ]
        listed = table(("sample", "nearest", "cosine"), rows) if rows else "no usable gradient"
        return f"Neighbours of {plural(len(self.sample_ids), 'sample')}, the closest pairs\n{listed}"


def near_duplicates(
    log: RunLog | Location,
    source: str = "probe",
    *,
    index: Literal["exact", "faiss"] = "exact",
    execution: Execution = HERE,
) -> Neighbours:
    """Each sample's nearest neighbour by the cosine of its mean unit gradient, over all rows.

    On the grid (source="probe") equal samples have equal gradients, cosine 1. Training events differ in
    timestep and noise, and tell much less. The N × D features go through a temporary file.

    Args:
        index: "exact" compares all pairs, N² · D multiplications; "faiss" (the extra "faiss") only those
            that may be near, where there are more than 20,000 samples, and holds the features in memory.

    Raises:
        LogError, ConfigurationError: as :func:`diffhook.influence`; or FAISS is not installed.
    """
    if index not in ("exact", "faiss"):
        raise ConfigurationError(f'index is {index!r}; expected "exact" or "faiss"')
    log = as_log(log)
    found = nearest_neighbours(source_table(log, source), execution, by_faiss=index == "faiss")
    return replace(found, names=log.names(), thumbnails=log.thumbnails)


def nearest_neighbours(table: Table, execution: Execution, *, by_faiss: bool = False) -> Neighbours:
    """The neighbours among a table's samples."""
    if not by_faiss:
        ids, index, cosines = nearest_several(table, execution, 1)
        return Neighbours(ids, ids[index[:, 0]], cosines[:, 0])
    ids = distinct_samples(table, execution)
    with execution.scratch() as folder:
        path = os.path.join(folder, "units")
        write_units(path, table, ids, execution)
        nearest, cosine = nearest_by_faiss(mapped(path, np.float32, table.dim))
    return Neighbours(ids, ids[nearest], cosine)


def nearest_several(
    table: Table, execution: Execution, k: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.intp], npt.NDArray[np.float32]]:
    """Ids (N,) ascending, and of each sample the k others of highest cosine, (N, k): their positions, and the
    cosines, descending. NaN for a sample without a usable gradient, −∞ where there are fewer others."""
    ids = distinct_samples(table, execution)
    nearest = partial(_nearest, k=k)
    index, cosines = compare_units(table, ids, nearest, _TILE, execution, "comparing samples")
    return ids, index, cosines


def compare_units(
    table: Table,
    ids: npt.NDArray[np.int64],
    nearest: Callable[[str, int, int, int], tuple[npt.NDArray[Any], ...]],
    tile: int,
    execution: Execution,
    title: str,
    prepare: Callable[[str], None] = lambda path: None,
) -> tuple[npt.NDArray[Any], ...]:
    """What ``nearest`` finds of every sample's mean unit gradient among those of all, tile by tile.

    Args:
        nearest: (file of the units, D, a tile's first sample, ``tile``) → arrays, a row for each sample of
            the tile.
        tile: samples of a tile.
        prepare: changes the file of the units first.
    """
    with execution.scratch() as folder:
        path = os.path.join(folder, "units")
        write_units(path, table, ids, execution)
        prepare(path)
        tasks = [delayed(nearest)(path, table.dim, start, tile) for start in range(0, len(ids), tile)]
        tiles = execution.compute(delayed(list)(tasks), title)
        return tuple(np.concatenate(parts) for parts in zip(*tiles, strict=True))


def write_units(path: str, table: Table, ids: npt.NDArray[np.int64], execution: Execution) -> None:
    """Each sample's mean unit gradient over all rows, at length 1 (or 0), as (N, D) float32 in a raw file."""
    allocate(path, np.float32, (len(ids), table.dim))
    rows = SampleRows(ReTrac(), ids, np.zeros(1, np.int64))  # all snapshots together
    reduce_samples(table, rows, _Units(path), execution, "summing up samples")


@dataclass(frozen=True)
class _Units:
    """Writes unit vectors to their place in a file that all workers see."""

    path: str

    def reduce(self, start: int, values: npt.NDArray[np.float64]) -> None:
        vectors = values[:, 2:]
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        units = np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0)
        fill(self.path, start, units.astype(np.float32))

    def combine(self, results: list[None]) -> None:
        return None


def _nearest(
    path: str, dim: int, start: int, tile: int, k: int
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float32]]:
    """Positions and cosines of the k nearest other samples, for those of one tile; of equals, the lower."""
    units = mapped(path, np.float32, dim)
    mine = np.asarray(units[start : start + tile])
    best = np.full((len(mine), k), -np.inf, np.float32)
    index = np.zeros((len(mine), k), np.intp)
    for other in range(0, len(units), tile):
        cosines = mine @ np.asarray(units[other : other + tile]).T
        if other == start:
            np.fill_diagonal(cosines, -np.inf)
        here, found = _highest(cosines, k)
        every, where = np.hstack([best, found]), np.hstack([index, other + here])
        order = np.argsort(-every, axis=1, kind="stable")[:, :k]
        best, index = (np.take_along_axis(values, order, 1) for values in (every, where))
    best[~mine.any(1)] = np.nan
    return index, best


def _highest(values: npt.NDArray[np.float32], k: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float32]]:
    """(rows, k) columns of the highest values, and these; writes −∞ over what it has found."""
    columns, found = [], []
    for _ in range(k):
        highest = values.argmax(1)[:, None]
        columns.append(highest)
        found.append(np.take_along_axis(values, highest, 1))
        np.put_along_axis(values, highest, -np.inf, 1)
    return np.hstack(columns), np.hstack(found)
