"""Which samples a batch holds: the dataset index travels inside the batch, invisibly to the loop.

Samplers and prefetching workers run ahead of the loop, so an index noted when it was drawn belongs
to a later batch. Carried through collation it survives workers, repeats, skipping and dispatching;
it is taken out again where the loop receives the batch.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from typing import Any, NamedTuple

import torch
from accelerate import data_loader
from accelerate.utils import is_torchdata_stateful_dataloader_available
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from diffhook.capture.loop.identity import KEYS, as_ids, with_roles
from diffhook.capture.loop.matching import blocks_of


class Tagged(NamedTuple):
    """A batch with the ids of its samples; a tuple, so that accelerate moves and slices both."""

    batch: Any
    sample_ids: Tensor | None  # of the items; where the rows of each are known, of every row


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
        if isinstance(fetched, _Fetched):
            items = fetched.items
            ids = None if fetched.indices is None else torch.tensor(fetched.indices)
        else:  # items of a stream: their own keys, before collation drops them
            items, ids = fetched, _ids_of_items(fetched)
        batch = self.collate(items)
        if not self.active or ids is None:
            return batch
        return Tagged(batch, with_roles(ids, blocks_of(items, batch)))


def _ids_of_items(items: Any) -> Tensor | None:
    if not isinstance(items, list) or not items or not all(isinstance(i, Mapping) for i in items):
        return None
    keys = (key for key in KEYS if all(key in item for item in items))
    found = (as_ids([_plain(item[key]) for item in items]) for key in keys)
    return next((ids for ids in found if ids is not None), None)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def can_tag(loader: Any) -> bool:
    """Whether the loader makes batches of single items (and not what the loop gets ready-made)."""
    return type(loader) in _known_kinds() and (
        isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is not None
    )


def _known_kinds() -> tuple[type, ...]:
    """Loaders of which a copy can be tagged; not of whatever kind a user has made of them."""
    if not is_torchdata_stateful_dataloader_available():
        return (DataLoader,)
    from torchdata.stateful_dataloader import StatefulDataLoader

    return DataLoader, StatefulDataLoader


def tag(loader: DataLoader[Any]) -> DataLoader[Any]:
    """A copy of the loader whose batches are :class:`Tagged`; the user's own stays as it is."""
    tagged = copy.copy(loader)
    if not isinstance(loader.dataset, IterableDataset):
        tagged.__dict__["dataset"] = _IndexedDataset(loader.dataset)  # DataLoader guards the attribute
    tagged.__dict__["collate_fn"] = _TaggingCollate(loader.collate_fn)
    return tagged


def untag(loader: Any) -> None:
    """From its next pass on, a loader made from :func:`tag`'s gives plain batches."""
    base = getattr(loader, "base_dataloader", loader)
    if isinstance(base.collate_fn, _TaggingCollate):
        base.collate_fn.active = False  # for the pass under way
        if isinstance(base.dataset, _IndexedDataset):
            base.__dict__["dataset"] = base.dataset.dataset
        base.__dict__["collate_fn"] = base.collate_fn.collate
        base._iterator = None  # persistent workers have a copy that still tags


_LOADERS = (
    data_loader.DataLoaderShard,
    data_loader.DataLoaderDispatcher,
    data_loader.SkipDataLoader,
)
# Called with (batch, indices in the dataset if known, dataset) just before the loop gets the batch, and with
# (None, None, dataset) once the pass over the loader is over. Answers whether it knows the batch's samples.
Listener = Callable[[Any, Tensor | None, Any], bool]

_listeners: list[weakref.WeakMethod[Listener]] = []
_originals: dict[type, Any] = {}


def listen(listener: Listener) -> None:
    """Have a method ``listener`` told of every batch of every prepared loader, while its object lives."""
    if not _listeners:
        for kind in _LOADERS:
            _originals[kind] = kind.__iter__
            kind.__iter__ = _untagging(kind.__iter__)
    _listeners.append(weakref.WeakMethod(listener))


def unlisten(listener: Listener) -> None:
    """Undo :func:`listen`; with the last listener gone, accelerate's classes are as they were."""
    _listeners[:] = [other for other in _listeners if other() not in (None, listener)]
    if not _listeners:
        for kind, original in _originals.items():
            kind.__iter__ = original  # type: ignore[attr-defined]
        _originals.clear()


def _untagging(iterate: Callable[[Any], Iterator[Any]]) -> Callable[[Any], Iterator[Any]]:
    @wraps(iterate)
    def untagged(loader: Any) -> Iterator[Any]:
        known, dataset = False, getattr(loader, "dataset", None)
        try:
            for item in iterate(loader):
                tagged = item if isinstance(item, Tagged) else Tagged(item, None)
                known = _tell(tagged.batch, tagged.sample_ids, dataset) or known
                yield tagged.batch
        finally:
            if known:
                _tell(None, None, dataset)

    return untagged


def _tell(batch: Any, sample_ids: Tensor | None, dataset: Any) -> bool:
    told = [listener() for listener in list(_listeners)]
    known = [listener(batch, sample_ids, dataset) for listener in told if listener is not None]
    return any(known)
