"""Copies of one picture: sought among the nearest by gradient, decided by the pixels of thumbnails."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from diffhook.analysis.pixels import pixels_of

ALIKE = 0.95
"""Correlation of grey pixels from which two pictures can be copies."""

ISOLATED = 1.3
"""By how much the next nearest picture must be further away than a copy is (Lowe's ratio, IJCV 2004). Members
of a series are as near to the next as to each other: a series is no set of copies."""

_ROUNDING = 0.5  # grey levels: no distance between two pictures counts for less

Distances = npt.NDArray[np.float64]
Positions = npt.NDArray[np.intp]


@dataclass(frozen=True)
class Copies:
    """What the pixels say.

    Attributes:
        exact: position of a sample → those with the very same thumbnail, its own among them; ascending.
        near: position of a sample → (its near copy, correlation of their pixels).
        isolation: (N,) log of the next nearest picture's distance over the nearest's, where two that are
            alike are nearest to each other; 0 where not, NaN without a thumbnail.
    """

    exact: dict[int, tuple[int, ...]]
    near: dict[int, tuple[int, float]]
    isolation: Distances


def find_copies(ids: npt.NDArray[np.int64], pairs: Positions, thumbnails: Mapping[int, bytes]) -> Copies:
    """Among N samples, of which some pairs may be copies.

    Args:
        ids: (N,).
        pairs: (P, 2) positions, each pair once: those near by gradient.
        thumbnails: id → PNG.
    """
    small, digests = pixels_of(thumbnails, ids.tolist())
    known = np.array([digest is not None for digest in digests])
    exact, isolation = _same(digests), np.where(known, 0.0, np.nan)
    isolation[list(exact)] = np.log(255 / _ROUNDING)
    grouped = np.array([exact.get(i, (i,))[0] for i in range(len(ids))])
    left, right = pairs.T
    apart = pairs[known[left] & known[right] & (grouped[left] != grouped[right])]
    near = {}
    for i, j, ratio in _isolated(apart, _distances(small, apart), len(ids)):
        alike = _correlation(small[i], small[j])
        if alike < ALIKE:
            continue
        isolation[[i, j]] = np.maximum(isolation[[i, j]], np.log(ratio))
        if ratio >= ISOLATED:
            near[i], near[j] = (j, alike), (i, alike)
    return Copies(exact, near, isolation)


def _same(digests: list[bytes | None]) -> dict[int, tuple[int, ...]]:
    alike: defaultdict[bytes, list[int]] = defaultdict(list)
    for i, digest in enumerate(digests):
        if digest is not None:
            alike[digest].append(i)
    groups = [tuple(group) for group in alike.values() if len(group) > 1]
    return {i: group for group in groups for i in group}


def _distances(small: npt.NDArray[np.uint8], pairs: Positions) -> Distances:
    """(P,) root mean square of the differences, in grey levels."""
    found = [np.sqrt(((small[i].astype(float) - small[j]) ** 2).mean()) for i, j in pairs]
    return np.maximum(np.array(found, np.float64), _ROUNDING)


def _isolated(pairs: Positions, distances: Distances, count: int) -> list[tuple[int, int, float]]:
    """Pairs that are nearest to each other, with the next nearest's distance over theirs."""
    around: list[list[tuple[float, int]]] = [[] for _ in range(count)]
    for (i, j), distance in zip(pairs.tolist(), distances.tolist(), strict=True):
        around[i].append((distance, j))
        around[j].append((distance, i))
    for each in around:
        each.sort()
    found = []
    for i, mine in enumerate(around):
        if not mine or mine[0][1] < i or around[mine[0][1]][0][1] != i:
            continue
        distance, j = mine[0]
        further = [d for d, k in (*mine, *around[j]) if k not in (i, j)]
        found.append((i, j, min(further, default=255.0) / distance))
    return found


def _correlation(first: npt.NDArray[np.uint8], second: npt.NDArray[np.uint8]) -> float:
    """Of the grey pixels; 0 where one picture is of a single grey."""
    left, right = (picture.mean(-1).ravel() for picture in (first, second))
    if not np.ptp(left) or not np.ptp(right):
        return 0.0
    return float(np.corrcoef(left, right)[0, 1])
