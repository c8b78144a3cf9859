"""What is known of batches that are fetched well before they are used."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from diffhook.capture.loop.identity.identity import RowIds, Unmatched

Found = RowIds | Unmatched | None

_REMEMBERED = 4096  # batches
_ANCHORS = 8  # tensors of a batch by which it is known again
_DEPTH = 3


class EarlyBatches:
    """Remembers whose rows a batch holds, by the batch itself, until its turn comes.

    A batch is known by its tensors, which are held weakly: so nothing is kept in memory, a dict that was
    copied in between is still the batch, and a tensor that is gone is not taken for a later one at the same
    address. Of a batch without tensors, nothing is remembered.
    """

    def __init__(self) -> None:
        self._kept: deque[tuple[list[weakref.ref[Tensor]], Found]] = deque(maxlen=_REMEMBERED)

    def keep(self, batch: Any, found: Found) -> None:
        """Remember what was found of a batch."""
        while self._kept and any(anchor() is None for anchor in self._kept[0][0]):
            self._kept.popleft()
        anchors = _anchors(batch)
        if anchors:
            self._kept.append((list(map(weakref.ref, anchors)), found))

    def find(self, batch: Any) -> Found:
        """What was found of this very batch, the last time that it came; None if nothing is remembered."""
        wanted = _anchors(batch)
        for anchors, found in reversed(self._kept):
            if len(anchors) == len(wanted) and all(a() is b for a, b in zip(anchors, wanted, strict=True)):
                return found
        return None

    def clear(self) -> None:
        """Forget all, such as those of an evaluation."""
        self._kept.clear()


def _anchors(batch: Any) -> list[Tensor]:
    return [tensor for tensor, _ in zip(_tensors(batch, 0), range(_ANCHORS), strict=False)]


def _tensors(value: Any, depth: int) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth < _DEPTH and isinstance(value, Mapping | list | tuple):
        for child in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(child, depth + 1)
