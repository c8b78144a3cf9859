"""How alike small pictures are."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from PIL import Image

_SIDE = 16  # pixels to which pictures are brought to compare them with many others
_ROUNDING = 1  # levels of 8 bits by which equal pixels may differ


def changed_share(one: Image.Image, other: Image.Image) -> float:
    """Share of the pixels in which two pictures differ: near 1 for a file that was saved again, scaled or
    blurred, small for a variant that differs in one place."""
    left, right = (np.asarray(each, np.int16) for each in (one, other.resize(one.size)))
    return float((np.abs(left - right).max(-1) > _ROUNDING).mean())


class Nearest:
    """Finds the pictures nearest to one, by the squared distance of their pixels.

    Args:
        pictures: id → picture in RGBA.
        ids: (N,) those to find, by position; one without a picture is never found.
    """

    def __init__(self, pictures: Mapping[int, Image.Image], ids: npt.NDArray[np.int64]) -> None:
        self._known = np.array([int(sample) in pictures for sample in ids], bool)
        self._pixels = np.zeros((len(ids), _SIDE * _SIDE * 4), np.float32)
        for i in np.flatnonzero(self._known):
            picture = pictures[int(ids[i])].resize((_SIDE, _SIDE))
            self._pixels[i] = np.asarray(picture, np.float32).ravel()

    def of(self, i: int, among: npt.NDArray[np.intp], k: int) -> list[int]:
        """At most ``k`` of the positions ``among``, nearest first; none where ``i`` has no picture."""
        among = among[self._known[among] & (among != i)]
        if not self._known[i]:
            return []
        apart = ((self._pixels[among] - self._pixels[i]) ** 2).sum(1)
        return [int(other) for other in among[np.argsort(apart, kind="stable")[:k]]]
