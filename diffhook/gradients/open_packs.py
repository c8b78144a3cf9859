"""Packs whose members come one by one, in the order of the backward."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from diffhook.gradients.packs import ALIGNED, Pack


class OpenPack(ABC):
    """A pack that waits for the rest of its members.

    Args:
        pack: what belongs into it.
        samples: rows of it.
        like: has its dtype and device.

    Attributes:
        left: name → samples still to come.
    """

    def __init__(self, pack: Pack, samples: int, like: Tensor) -> None:
        self.pack = pack
        self.left = dict.fromkeys(pack.slices, samples)
        self._samples = samples
        self._like = like.new_empty(0)

    def add(self, name: str, values: Tensor, rows: slice) -> None:
        """Some rows of a member: (b, n)."""
        self._put(name, values, rows)
        self.left[name] -= len(values)
        if not self.left[name]:
            del self.left[name]

    @abstractmethod
    def _put(self, name: str, values: Tensor, rows: slice) -> None: ...

    @abstractmethod
    def values(self) -> Tensor:
        """(samples, size), zero where nothing has come."""


class _Written(OpenPack):
    """Copies every member to its place at once: its memory may be given out again."""

    def __init__(self, pack: Pack, samples: int, like: Tensor) -> None:
        super().__init__(pack, samples, like)
        self._values = like.new_zeros(samples, pack.size)

    def _put(self, name: str, values: Tensor, rows: slice) -> None:
        self._values[rows, self.pack.slices[name]] = values

    def values(self) -> Tensor:
        return self._values


class _Gathered(OpenPack):
    """Keeps the members and puts all in place by one kernel."""

    def __init__(self, pack: Pack, samples: int, like: Tensor) -> None:
        super().__init__(pack, samples, like)
        self._pieces: dict[str, list[tuple[int, Tensor]]] = {}  # by the first row

    def _put(self, name: str, values: Tensor, rows: slice) -> None:
        self._pieces.setdefault(name, []).append((rows.start, values))

    def values(self) -> Tensor:
        gap = self._like.new_zeros(1, ALIGNED).expand(self._samples, -1)
        columns: list[Tensor] = []
        for name, place in self.pack.slices.items():
            size = place.stop - place.start
            columns.append(self._column(name, size))
            if size % ALIGNED:
                columns.append(gap[:, size % ALIGNED :])
        return torch.cat(columns, 1)

    def _column(self, name: str, size: int) -> Tensor:
        """(samples, n) of one member."""
        pieces = self._pieces.get(name, [])
        if name in self.left:  # not all of it, or nothing
            column = self._like.new_zeros(self._samples, size)
            for start, values in pieces:
                column[start : start + len(values)] = values
            return column
        pieces.sort(key=lambda piece: piece[0])
        return pieces[0][1] if len(pieces) == 1 else torch.cat([values for _, values in pieces])


def open_pack(pack: Pack, samples: int, like: Tensor) -> OpenPack:
    """An empty pack. On a CPU a copy costs little, and members may lie in memory that is used again."""
    return (_Written if like.device.type == "cpu" else _Gathered)(pack, samples, like)
