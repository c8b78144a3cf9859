"""Which samples a batch holds: the dataset index travels inside the batch, invisibly to the loop.

Samplers and prefetching workers run ahead of the loop, so an index noted when it was drawn belongs
to a later batch. Carried through collation it survives workers, repeats, skipping and dispatching;
it is taken out again where the loop receives the batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import Any, NamedTuple

import torch
from accelerate import data_loader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset


class Tagged(NamedTuple):
    """A batch with the ids of its samples; a tuple, so that accelerate moves and slices both."""

    batch: Any
    sample_ids: Tensor


class _Fetched(NamedTuple):
    """What a loader fetches for one batch, on its way to collation."""

    indices: list[int] | None
    items: Any


class _IndexedDataset(Dataset[Any]):
    """The dataset, but batches are fetched together with their indices.

    Single items, attributes read and attributes set are the dataset's own.
    """

    def __init__(self, dataset: Any) -> None:
        self.__dict__["dataset"] = dataset

    def __getitem__(self, index: Any) -> Any:
        return self.dataset[index]

    def __getitems__(self, indices: Sequence[Any]) -> _Fetched:
        if hasattr(self.dataset, "__getitems__") and self.dataset.__getitems__:
            items = self.dataset.__getitems__(indices)
        else:
            items = [self.dataset[index] for index in indices]
        plain = all(hasattr(index, "__index__") for index in indices)  # samplers may draw other keys
        return _Fetched([int(index) for index in indices] if plain else None, items)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # while unpickling in a worker
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.dataset, name, value)


class _TaggingCollate:
    """Collates the items alone and, while ``active``, tags the result."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate
        self.active = True

    def __call__(self, fetched: Any) -> Any:
        if not isinstance(fetched, _Fetched):
            return self.collate(fetched)
        batch = self.collate(fetched.items)
        if not self.active or fetched.indices is None:
            return batch
        return Tagged(batch, torch.tensor(fetched.indices))


def can_tag(loader: DataLoader[Any]) -> bool:
    """Whether the loader draws samples by index (not an IterableDataset, not ready-made batches)."""
    return (
        type(loader) is DataLoader
        and not isinstance(loader.dataset, IterableDataset)
        and loader.batch_sampler is not None
    )


def tag(loader: DataLoader[Any]) -> DataLoader[Any]:
    """A copy of the loader whose batches are :class:`Tagged`; the user's own stays as it is."""
    tagged = copy.copy(loader)
    tagged.__dict__["dataset"] = _IndexedDataset(loader.dataset)  # DataLoader guards the attribute
    tagged.__dict__["collate_fn"] = _TaggingCollate(loader.collate_fn)
    return tagged


def untag(loader: Any) -> None:
    """From its next pass on, a loader made from :func:`tag`'s gives plain batches."""
    base = getattr(loader, "base_dataloader", loader)
    if isinstance(base.collate_fn, _TaggingCollate):
        base.collate_fn.active = False  # for the pass under way
        base.__dict__["dataset"] = base.dataset.dataset
        base.__dict__["collate_fn"] = base.collate_fn.collate
        base._iterator = None  # persistent workers have a copy that still tags


_LOADERS = (
    data_loader.DataLoaderShard,
    data_loader.DataLoaderDispatcher,
    data_loader.SkipDataLoader,
)
_listeners: list[Callable[[Tensor | None], None]] = []
_originals: dict[type, Any] = {}


def listen(listener: Callable[[Tensor | None], None]) -> None:
    """Call ``listener`` with every batch's sample ids, just before the loop gets it, and with None
    once the pass over the loader is over."""
    if not _listeners:
        for kind in _LOADERS:
            _originals[kind] = kind.__iter__
            kind.__iter__ = _untagging(kind.__iter__)
    _listeners.append(listener)


def unlisten(listener: Callable[[Tensor | None], None]) -> None:
    """Undo :func:`listen`; with the last listener gone, accelerate's classes are as they were."""
    if listener in _listeners:
        _listeners.remove(listener)
        if not _listeners:
            for kind, original in _originals.items():
                kind.__iter__ = original  # type: ignore[attr-defined]
            _originals.clear()


def _untagging(iterate: Callable[[Any], Iterator[Any]]) -> Callable[[Any], Iterator[Any]]:
    @wraps(iterate)
    def untagged(loader: Any) -> Iterator[Any]:
        tagged = False
        try:
            for item in iterate(loader):
                if isinstance(item, Tagged):
                    tagged = True
                    _tell(item.sample_ids)
                    item = item.batch
                yield item
        finally:
            if tagged:
                _tell(None)

    return untagged


def _tell(sample_ids: Tensor | None) -> None:
    for listener in list(_listeners):
        listener(sample_ids)
