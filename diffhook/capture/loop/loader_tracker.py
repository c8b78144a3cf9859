"""What is learned of a run's data from the batches that come by."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from diffhook.log.samples import ROLE


class Data:
    """Which dataset is trained on, where its samples lie, and whose batch a model is called on."""

    def __init__(self) -> None:
        self.first: Any = None  #: the loader that was prepared first
        self.unclear = False  #: batches of two datasets came, and no model was called between them
        self._dataset: Any = None  # of the last batch
        self._unused: Any = None  # of a batch that no model was called on yet
        self._trained: set[int] = set()  # id() of datasets; the loaders keep them alive
        self._places: dict[int, int] = {}  # id of a sample → its index

    def received(self, dataset: Any) -> None:
        """A batch has come; None: a pass over a loader is over."""
        self.unclear = dataset is not None and (
            self.unclear or not (self._unused is None or self._unused is dataset)
        )
        self._dataset = self._unused = dataset

    def used(self) -> None:
        """A model was called."""
        self._unused = None

    def trained(self) -> None:
        """The last batch was differentiated."""
        self.unclear = False
        if self._dataset is not None:
            self._trained.add(id(self._dataset))

    def trains(self, dataset: Any) -> bool:
        """Whether a dataset is trained on; before anything was, whether it was prepared first."""
        if self._trained:
            return id(dataset) in self._trained
        return self.first is not None and dataset is getattr(self.first, "dataset", None)

    def note(self, sample_ids: Tensor, index: Tensor) -> None:
        """Samples with ids of their own, and where they lie in the dataset."""
        if len(sample_ids) == len(index):  # else it is not known which rows are whose
            self._places.update(zip((sample_ids % ROLE).tolist(), (index % ROLE).tolist(), strict=True))

    def places(self, sample_ids: frozenset[int], own_ids: bool) -> frozenset[int]:
        """The indices of samples; with ids of their own, of those that have come by."""
        plain = {sample % ROLE for sample in sample_ids}
        return frozenset(self._places[s] for s in plain if s in self._places) if own_ids else frozenset(plain)
