"""Whether a sample's gradients lie nearer to those of another label than to those of its own."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from functools import partial

import numpy as np
import numpy.typing as npt

from diffhook.analysis.duplicates import compare_units
from diffhook.analysis.execution import Execution
from diffhook.analysis.grouped import distinct_samples
from diffhook.analysis.methods import WhitenedReTrac
from diffhook.analysis.methods.whitening import half_whitened
from diffhook.analysis.raw_arrays import fill, mapped
from diffhook.analysis.second_moment import second_moment
from diffhook.log import Table

_TILE = 1024  # samples against all
_NEAREST = 10
_RIDGE = 0.03  # λ in units of the mean eigenvalue


def label_neighbours(
    table: Table, labels: Mapping[int, Hashable], execution: Execution
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], list[Hashable]]:
    """(N,) ids, ascending; (N,) mean cosine with the ten nearest samples of another label, less that with the
    ten of the same; and N labels, that which most of those ten others have.

    Of mean unit gradients over all rows, whitened by the second moment G of single ones, a root of
    (G + λI)⁻¹ on either side: what all gradients share says nothing of a label. NaN for a sample without a
    label, or without a usable gradient, or where its label is the only one.

    Args:
        labels: sample id → label.
    """
    ids = distinct_samples(table, execution)
    codes: dict[Hashable, int] = {}
    numbered = [codes.setdefault(labels[i], len(codes)) if i in labels else -1 for i in ids.tolist()]
    known = partial(_nearer, labels=np.array(numbered, np.int64))
    whiten = partial(_whiten, table=table, execution=execution)
    nearer, others = compare_units(table, ids, known, _TILE, execution, "comparing labels", whiten)
    texts = [*codes, None]
    return ids, nearer, [texts[code] for code in others.tolist()]


def _whiten(path: str, table: Table, execution: Execution) -> None:
    """The units of a file, in place; they keep their length."""
    moment = second_moment(table, WhitenedReTrac(), execution)
    units = mapped(path, np.float32, table.dim)
    for start in range(0, len(units), _TILE):
        vectors = half_whitened(np.asarray(units[start : start + _TILE], np.float64), moment, _RIDGE)
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        fill(path, start, (vectors / np.where(lengths > 0, lengths, 1)).astype(np.float32))


def _nearer(
    path: str, dim: int, start: int, tile: int, labels: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    units = mapped(path, np.float32, dim)
    mine = np.asarray(units[start : start + tile])
    own = labels[start : start + len(mine)]
    cosines = (mine @ np.asarray(units).T).astype(np.float64)
    cosines[np.arange(len(mine)), start + np.arange(len(mine))] = -np.inf
    cosines[:, labels < 0] = -np.inf
    same = own[:, None] == labels
    others = np.where(same, -np.inf, cosines)
    found = _mean_nearest(others) - _mean_nearest(np.where(same, cosines, -np.inf))
    found[(own < 0) | ~mine.any(1)] = np.nan
    return found, _label_of_most(others, labels)


def _label_of_most(cosines: npt.NDArray[np.float64], labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """(rows,) the label of most of the nearest; −1 where none is finite."""
    nearest = _nearest(cosines)
    finite = np.isfinite(np.take_along_axis(cosines, nearest, 1))
    numbers = [each[known] for each, known in zip(labels[nearest], finite, strict=True)]
    return np.array([np.bincount(each).argmax() if len(each) else -1 for each in numbers], np.int64)


def _mean_nearest(cosines: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """(rows,) mean of the highest finite ones; NaN where there is none."""
    nearest = np.take_along_axis(cosines, _nearest(cosines), 1)
    finite = np.isfinite(nearest)
    count = finite.sum(1)
    total = np.where(finite, nearest, 0.0).sum(1)
    return np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0)


def _nearest(cosines: npt.NDArray[np.float64]) -> npt.NDArray[np.intp]:
    """(rows, _NEAREST or all) columns of the highest, in any order."""
    last = min(_NEAREST, cosines.shape[1]) - 1
    return np.argpartition(-cosines, last, axis=1)[:, : last + 1]
