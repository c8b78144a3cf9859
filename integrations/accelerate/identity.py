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


class _IndexedDataset(Dataset[Any]):
    """Gives each item with its index; everything else is the dataset's."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        if hasattr(dataset, "__getitems__"):
            self.__getitems__ = self._getitems

    def __getitem__(self, index: Any) -> tuple[int, Any]:
        return int(index), self.dataset[index]

    def _getitems(self, indices: Sequence[Any]) -> list[tuple[int, Any]]:
        items = self.dataset.__getitems__(indices)
        return list(zip(map(int, indices), items, strict=True))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # while unpickling in a worker
            raise AttributeError(name)
        return getattr(self.dataset, name)


class _TaggingCollate:
    """Collates the items alone and, while ``active``, tags the result."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate
        self.active = True

    def __call__(self, pairs: list[tuple[int, Any]]) -> Any:
        batch = self.collate([item for _, item in pairs])
        if not self.active:
            return batch
        return Tagged(batch, torch.tensor([index for index, _ in pairs]))


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
        base.collate_fn.active = False
        base._iterator = None  # persistent workers have a copy that is still active


_LOADERS = (
    data_loader.DataLoaderShard,
    data_loader.DataLoaderDispatcher,
    data_loader.SkipDataLoader,
)
_listeners: list[Callable[[Tensor], None]] = []
_originals: dict[type, Any] = {}


def listen(listener: Callable[[Tensor], None]) -> None:
    """Call ``listener`` with the sample ids of every tagged batch, just before the loop gets it."""
    if not _listeners:
        for kind in _LOADERS:
            _originals[kind] = kind.__iter__
            kind.__iter__ = _untagging(kind.__iter__)
    _listeners.append(listener)


def unlisten(listener: Callable[[Tensor], None]) -> None:
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
        for item in iterate(loader):
            if isinstance(item, Tagged):
                for listener in list(_listeners):
                    listener(item.sample_ids)
                item = item.batch
            yield item

    return untagged
