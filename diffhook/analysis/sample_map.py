"""A flat map of the samples: near each other where their gradients point the same way."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from diffhook.analysis.duplicates import write_units
from diffhook.analysis.execution import Execution
from diffhook.analysis.grouped import distinct_samples
from diffhook.analysis.raw_arrays import mapped
from diffhook.log import Table

Floats = npt.NDArray[np.floating[Any]]

_TILE = 2048  # samples read at once
_MORE = 8  # directions beyond the two that are wanted: the iteration converges by what lies after them
_ITERATIONS = 8


@dataclass(frozen=True)
class SampleMap:
    """Where each sample lies.

    Attributes:
        sample_ids: (N,) int64, ascending.
        positions: (N, 2) float64, on the first two principal axes of the samples' mean unit gradients; NaN
            for a sample without a usable gradient.
        shares: (2,) of the variance, which each axis has.
    """

    sample_ids: npt.NDArray[np.int64]
    positions: npt.NDArray[np.float64]
    shares: tuple[float, float]


def sample_map(table: Table, execution: Execution, chosen: npt.NDArray[np.int64] | None = None) -> SampleMap:
    """The map of a table's samples, by principal component analysis of each one's mean unit gradient.

    One pass over the rows; the N × D means go through a temporary file.

    Args:
        chosen: ids of those that are wanted; None: all.
    """
    ids = distinct_samples(table, execution)
    ids = ids if chosen is None else np.intersect1d(ids, chosen)
    if not len(ids):
        return SampleMap(ids, np.empty((0, 2)), (0.0, 0.0))
    with execution.scratch() as folder:
        path = os.path.join(folder, "units")
        write_units(path, table, ids, execution)
        units = mapped(path, np.float32, table.dim)
        usable = np.concatenate([tile.any(1) for tile in _tiles(units)])
        positions, shares = _principal(units, usable)
    return SampleMap(ids, np.where(usable[:, None], positions, np.nan), shares)


def _principal(units: Floats, usable: npt.NDArray[np.bool_]) -> tuple[Floats, tuple[float, float]]:
    """(N, 2) coordinates and the two axes' shares of the variance, by subspace iteration (Halko, Martinsson
    and Tropp 2011, algorithm 4.4): as many passes over the file, and no D × D matrix."""
    count, dim = max(int(usable.sum()), 1), units.shape[1]
    mean = sum(tile.sum(0, dtype=np.float64) for tile in _tiles(units)) / count
    axes: Floats = np.random.default_rng(0).standard_normal((dim, min(2 + _MORE, dim)))
    for _ in range(_ITERATIONS):
        axes = np.linalg.qr(axes)[0]
        axes = np.sum([tile.T @ (tile @ axes) for tile in _centred(units, usable, mean)], axis=0)
    axes = np.linalg.qr(axes)[0]
    placed = np.concatenate([tile @ axes for tile in _centred(units, usable, mean)])
    rotation = np.linalg.svd(placed, full_matrices=False)[2].T[:, :2]
    found = placed @ rotation
    found *= np.where(np.abs(found.min(0)) > found.max(0), -1.0, 1.0)  # an axis has no sign of its own
    whole = sum(float((tile**2).sum()) for tile in _centred(units, usable, mean)) or 1.0
    wide = np.zeros((len(units), 2))
    wide[:, : found.shape[1]] = found
    first, second = ((wide**2).sum(0) / whole).tolist()
    return wide, (first, second)


def _tiles(units: Floats) -> Iterator[Floats]:
    for start in range(0, len(units), _TILE):
        yield np.asarray(units[start : start + _TILE])


def _centred(units: Floats, usable: npt.NDArray[np.bool_], mean: Floats) -> Iterator[Floats]:
    """Samples without a gradient stay zero, and turn no axis."""
    for number, tile in enumerate(_tiles(units)):
        yield (tile - mean) * usable[number * _TILE :][: len(tile), None]
