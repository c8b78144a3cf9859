"""What is learned of a run's data from the batches that come by."""

from __future__ import annotations

import weakref
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from diffhook.capture.loop.identity.identity import Identity, RowIds, Unmatched
from diffhook.log.samples import ROLE_STRIDE

Found = RowIds | Unmatched | None

_REMEMBERED = 4096  # batches
_ANCHORS = 8  # tensors of a batch by which it is known again
_DEPTH = 3


class Batches:
    """What is known of batches that are fetched well before they are used, by the batch itself.

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


class LoaderTracker:
    """Which dataset is trained on, and where its samples lie."""

    def __init__(self) -> None:
        self.first: Any = None  #: the dataset of the loader that was prepared first
        self._dataset: Any = None  # of the last batch
        self._trained: set[int] = set()  # id() of datasets; the loaders keep them alive
        self._places: dict[int, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))

    def received(self, dataset: Any) -> None:
        """A batch has come."""
        self._dataset = dataset

    def trained(self) -> None:
        """The last batch was differentiated."""
        if self._dataset is not None:
            self._trained.add(id(self._dataset))

    def trains(self, dataset: Any) -> bool:
        """Whether a dataset is trained on; before anything was, whether it was prepared first."""
        if self._trained:
            return id(dataset) in self._trained
        return dataset is not None and dataset is self.first

    def note(self, dataset: Any, sample_ids: Tensor, index: Tensor) -> None:
        """Samples with ids of their own, and where they lie in a dataset: perhaps in several places."""
        if len(sample_ids) == len(index):  # else it is not known which rows are whose
            for sample, place in zip(
                (sample_ids % ROLE_STRIDE).tolist(), (index % ROLE_STRIDE).tolist(), strict=True
            ):
                self._places[id(dataset)][sample].add(place)

    def places(self, dataset: Any, sample_ids: frozenset[int], identity: Identity) -> frozenset[int]:
        """The indices of samples in a dataset; with ids of their own, of those that have come by."""
        plain = frozenset(sample % ROLE_STRIDE for sample in sample_ids)
        if identity.by_index(dataset):
            return identity.datasets.indices(dataset, plain, identity.names)
        places = self._places[id(dataset)]
        return frozenset(place for sample in plain if sample in places for place in places[sample])
