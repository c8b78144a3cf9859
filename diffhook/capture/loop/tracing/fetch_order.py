"""Whether the batch that came last is the one that the model is called on."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from diffhook.capture.loop.events import tensors_of
from diffhook.capture.loop.identity import Unmatched

_AHEAD = Unmatched(
    "fetched-ahead",
    "the loop holds several batches that it has not trained on yet, and which of them the model is called on "
    "is not known: such steps are not captured. Name the samples with hook.step(sample_ids=...)",
)
_SEVERAL_LOADERS = Unmatched(
    "several-loaders",
    "batches of two loaders came before the model was called, and it is not known whose samples it sees: "
    "such steps are not captured. Name them with hook.step(sample_ids=...)",
)


@dataclass
class _Pass:
    """One pass over a loader."""

    unused: list[weakref.ref[Tensor]] = field(default_factory=list)  # batches that no model was called on
    count: int = 0  # of them, with those that hold no tensor
    ahead: bool = False


class FetchOrder:
    """Tells loops that fetch ahead from loops that skip batches: a batch that was skipped is let go of.

    One that the loop still holds may be the next to be trained on. A pass over a loader in which that
    happened once is not believed to its end.
    """

    def __init__(self) -> None:
        self._passes: dict[int, _Pass] = {}
        self._last: _Pass | None = None

    def received(self, source: object | None, batch: Any) -> None:
        """A batch has come; one that the loop names itself has no source."""
        self._last = None if source is None else self._passes.setdefault(id(source), _Pass())
        if self._last is not None:
            self._last.count += 1
            self._last.unused += [weakref.ref(tensor) for tensor in tensors_of(batch)[:1]]

    def ended(self, source: object | None) -> None:
        """A pass is over; the id() of its source may come again."""
        if source is not None and self._passes.pop(id(source), None) is self._last:
            self._last = None

    def used(self) -> Unmatched | None:
        """A model is called. Returns why it is not known on which batch, if it is not."""
        last = self._last
        if last is None:
            return None
        others = any(other.count for other in self._passes.values() if other is not last)
        last.ahead = last.ahead or any(earlier() is not None for earlier in last.unused[:-1])
        for every in self._passes.values():
            every.unused.clear()
            every.count = 0
        if last.ahead:
            return _AHEAD
        return _SEVERAL_LOADERS if others else None
