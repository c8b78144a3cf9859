"""Small things that are treated together: one operation costs as much as one on a hundred of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

ALIGNED = 32  #: numbers; every member of a pack begins at a multiple
_CAPACITY = 1 << 18  # numbers a sample


@dataclass(frozen=True)
class Pack:
    """Members side by side in one vector.

    Attributes:
        slices: name → where it lies.
        size: length of the vector, a multiple of ALIGNED.
    """

    slices: Mapping[str, slice]
    size: int


def packed(sizes: Mapping[str, int]) -> list[Pack]:
    """Packs of consecutive members, in the order of ``sizes`` (name → numbers)."""
    packs: list[Pack] = []
    slices: dict[str, slice] = {}
    end = 0
    for name, size in sizes.items():
        if slices and end + size > _CAPACITY:
            packs.append(Pack(slices, end))
            slices, end = {}, 0
        slices[name] = slice(end, end + size)
        end += size + -size % ALIGNED
    return [*packs, Pack(slices, end)] if slices else packs
