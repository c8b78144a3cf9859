"""Nearest neighbours by FAISS: far fewer than all pairs are compared. Needs the extra "faiss"."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from diffhook.errors import ConfigurationError

ALL_PAIRS = 20_000  # samples up to which FAISS, too, compares all
_PROBES = 32  # lists that are looked through for a sample
_BATCH = 4096
_TRAINING = 64  # samples per list that learn the lists' centres


def nearest_by_faiss(
    units: npt.NDArray[np.float32],
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float32]]:
    """Position and cosine of each row's nearest other row; NaN for rows of zeros.

    Up to 20,000 rows all pairs are compared. Beyond, √N inverted lists are made by direction, and a row
    is compared with those of the 32 lists nearest to it: near-duplicates lie in the same list or in a
    neighbouring one, but a far neighbour may not be the nearest of all. Holds the rows in memory.

    Args:
        units: (N, D) rows of length 1, or 0.

    Raises:
        ConfigurationError: FAISS is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise ConfigurationError("index='faiss' needs FAISS: pip install 'diffhook[faiss]'") from error
    index = _index(faiss, units)
    best = np.full(len(units), np.nan, np.float32)
    position = np.zeros(len(units), np.intp)
    for start in range(0, len(units), _BATCH):
        mine = np.ascontiguousarray(units[start : start + _BATCH])
        cosines, found = index.search(mine, 2)
        own = np.arange(start, start + len(mine))
        column = (found[:, 0] == own).astype(int)  # the second, where the first is the row itself
        chosen = np.take_along_axis(found, column[:, None], 1)[:, 0]
        known = (chosen >= 0) & mine.any(1)
        position[own[known]] = chosen[known]
        best[own[known]] = np.take_along_axis(cosines, column[:, None], 1)[known, 0]
    return position, best


def _index(faiss: Any, units: npt.NDArray[np.float32]) -> Any:
    count, dim = units.shape
    index = faiss.IndexFlatIP(dim)
    if count > ALL_PAIRS:
        lists = int(count**0.5)
        index = faiss.IndexIVFFlat(index, dim, lists, faiss.METRIC_INNER_PRODUCT)
        index.nprobe = _PROBES
        index.train(np.ascontiguousarray(units[:: max(count // (lists * _TRAINING), 1)]))
    for start in range(0, count, _BATCH):
        index.add(np.ascontiguousarray(units[start : start + _BATCH]))
    return index
