"""Which dataset a run trains on, and where its samples lie, learned from the batches that come by."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import Tensor

from diffhook.capture.loop.identity.identity import Identity
from diffhook.log.samples import ROLE_STRIDE


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
