"""Which samples a batch holds: the dataset index travels inside the batch, invisibly to the loop.

Samplers and prefetching workers run ahead of the loop, so an index noted when it was drawn belongs
to a later batch. Carried through collation it survives workers, repeats, skipping and dispatching;
it is taken out again where the loop receives the batch.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, wraps
from operator import getitem
from typing import Any, NamedTuple

import torch
from accelerate import data_loader
from accelerate.utils import is_torchdata_stateful_dataloader_available
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, SequentialSampler

from diffhook.capture.loop.identity.batch_ids import KEYS, as_ids
from diffhook.capture.loop.identity.matching import Items, Order, guarded
from diffhook.capture.loop.identity.origin import Origin, pack, unpack
from diffhook.gradients import Guarded, host
from diffhook.integrations.accelerate.fetching import FetchCheck, Reference, reference
from diffhook.integrations.accelerate.stand_in import StandIn
from diffhook.integrations.torch import fetches


class Tagged(NamedTuple):
    """A batch with where it came from; a tuple, so that accelerate moves and slices both."""

    batch: Any
    origin: Tensor | None  # see diffhook.capture.loop.identity.origin.pack; None where we have failed


class _Fetched(NamedTuple):
    """What a loader fetches for one batch, on its way to collation."""

    indices: list[int] | None  # of the items, unless the sampler draws other keys
    items: Any
    reference: Reference | None  # where the dataset fetches several items at once, in an order of its own
    failed: bool = False  # in us


class _IndexedDataset(StandIn, Dataset[Any]):
    """The dataset, but batches are fetched together with their indices."""

    def __getitem__(self, index: Any) -> Any:
        return self._original[index]

    def __getitems__(self, indices: Sequence[Any]) -> _Fetched:
        dataset = self._original
        one_by_one = guarded(reference, dataset)
        asked = list(indices)
        if getattr(dataset, "__getitems__", None):
            items = dataset.__getitems__(indices)
        else:
            items = list(map(partial(getitem, dataset), indices))
        return guarded(_fetched, asked, items, one_by_one) or _Fetched(None, items, None, failed=True)


def _fetched(indices: list[Any], items: Any, one_by_one: Any) -> _Fetched:
    plain = all(hasattr(index, "__index__") for index in indices)
    known = [int(index) for index in indices] if plain else None
    return _Fetched(known, items, one_by_one(indices))


class _TaggingCollate:
    """Collates the items alone and, while ``active``, tags the result."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate
        self.active = True
        self._order = Order()  # of this process or worker
        self._check = FetchCheck()

    def __call__(self, fetched: Any) -> Any:
        items = fetched.items if isinstance(fetched, _Fetched) else fetched
        seen: Any = guarded(self._look, fetched) if self.active else _UNTAGGED
        batch = self.collate(items)
        return batch if seen is _UNTAGGED else Tagged(batch, seen and guarded(_pack, *seen, batch))

    def _look(self, fetched: Any) -> Any:
        """Before items are collated: their indices, and what they are; or :data:`_UNTAGGED`."""
        if not isinstance(fetched, _Fetched):  # of a stream: their own keys, before collation drops them
            fetched = _Fetched(_ids_of_items(fetched), fetched, None)
        if fetched.failed:
            return None
        if fetched.indices is None:
            return _UNTAGGED
        return fetched.indices, Items(self._in_order(fetched), self._order, fetched.indices)

    def _in_order(self, fetched: _Fetched) -> Any:
        if fetched.reference is None or fetched.indices is None:
            return fetched.items
        return self._check.in_order(fetched.indices, fetched.items, fetched.reference)


_UNTAGGED = object()  # a batch whose indices are unknown


def _pack(indices: list[int], items: Items, batch: Any) -> Tensor:
    return pack(torch.tensor(indices), items.match(batch))


def _ids_of_items(items: Any) -> list[int] | None:
    if not isinstance(items, list) or not items or not all(isinstance(i, Mapping) for i in items):
        return None
    keys = (key for key in KEYS if all(key in item for item in items))
    found = (as_ids([_plain(item[key]) for item in items]) for key in keys)
    return next((ids.tolist() for ids in found if ids is not None), None)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def can_tag(loader: Any) -> bool:
    """Whether the loader makes batches of single items (and not what the loop gets ready-made)."""
    return type(loader) in _known_kinds() and (
        isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is not None
    )


def is_shuffled(loader: DataLoader[Any]) -> bool:
    """Whether batches come in another order than the dataset has its items in."""
    batches = loader.batch_sampler
    sampler = loader.sampler if batches is None else getattr(batches, "sampler", None)
    return not isinstance(loader.dataset, IterableDataset) and not isinstance(sampler, SequentialSampler)


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


def tag_prepared(loader: Any) -> DataLoader[Any] | None:
    """Have a loader that is prepared already tag its batches from its next pass on.

    Returns:
        A copy of it as the user has made it; None if it cannot be tagged.
    """
    base = getattr(loader, "base_dataloader", loader)
    if not can_tag(base):
        return None
    plain, tagged = copy.copy(base), tag(base)
    for name in ("dataset", "collate_fn"):
        base.__dict__[name] = tagged.__dict__[name]
    return plain


def untag(loader: Any) -> None:
    """From its next pass on, a loader made from :func:`tag`'s gives plain batches."""
    base = getattr(loader, "base_dataloader", loader)
    if isinstance(base.collate_fn, _TaggingCollate):
        base.collate_fn.active = False  # for the pass under way
        if isinstance(base.dataset, _IndexedDataset):
            base.__dict__["dataset"] = users_own(base.dataset)
        base.__dict__["collate_fn"] = base.collate_fn.collate
        base._iterator = None  # persistent workers have a copy that still tags


_LOADERS = (
    data_loader.DataLoaderShard,
    data_loader.DataLoaderDispatcher,
    data_loader.SkipDataLoader,
)
# Called with (batch, arrival) just before the loop gets the batch, and with (None, arrival) once the pass
# over the loader is over.
_listeners: list[Guarded] = []
_originals: dict[type, Any] = {}


@dataclass(frozen=True)
class Arrival:
    """Where a batch came from, as that has travelled with it.

    Attributes:
        packed: see :func:`~diffhook.capture.loop.identity.origin.pack`.
        unknown: what is known without it.
    """

    packed: Any
    unknown: Origin

    @classmethod
    def untagged(cls, dataset: Any) -> Arrival:
        """Of a batch from a loader that was not prepared, with which nothing has travelled."""
        return cls(_UNTAGGED, Origin(dataset, kind="unprepared", source=dataset))

    @property
    def waits(self) -> bool:
        """Whether an accelerator is waited for to read it."""
        return isinstance(self.packed, Tensor) and host.waits(self.packed)

    def origin(self) -> Origin:
        """Read it."""
        return guarded(_origin, self.packed, self.unknown) or Origin(
            kind="failed", source=self.unknown.source
        )


class _Listening:
    """Has a hook told of every batch of every prepared loader, until it is removed."""

    def __init__(self, hook: Guarded) -> None:
        self._hook = hook

    def remove(self) -> None:
        """With the last one gone, accelerate's classes are as they were."""
        _listeners[:] = [other for other in _listeners if other is not self._hook]
        if not _listeners:
            for kind, original in _originals.items():
                kind.__iter__ = original  # type: ignore[attr-defined]
            _originals.clear()


def listen(hook: Guarded) -> _Listening:
    """Have ``hook`` told of every batch of every prepared loader."""
    if not _originals:
        for kind in _LOADERS:
            _originals[kind] = kind.__iter__
            kind.__iter__ = _untagging(kind.__iter__)
    _listeners.append(hook)
    return _Listening(hook)


def _untagging(iterate: Callable[[Any], Iterator[Any]]) -> Callable[[Any], Iterator[Any]]:
    # A loop's last iterator may outlive this module's names.
    finalizing, listeners = sys.is_finalizing, _listeners

    @wraps(iterate)
    def untagged(loader: Any) -> Iterator[Any]:
        source = object()
        unknown = guarded(_unknown_origin, loader, source) or Origin(kind="failed", source=source)
        try:
            for item in _fetched_for(loader, iterate):
                batch, packed = item if isinstance(item, Tagged) else (item, _UNTAGGED)
                for listener in list(listeners):
                    listener(batch, Arrival(packed, unknown))
                yield batch
        finally:
            for listener in list(listeners):
                if not finalizing():
                    listener(None, Arrival(_UNTAGGED, unknown))

    return untagged


def _fetched_for(loader: Any, iterate: Callable[[Any], Iterator[Any]]) -> Iterator[Any]:
    """What the loader iterates over, while the plain loader within it tells nobody of its batches."""
    items = iterate(loader)
    while True:
        before = guarded(fetches.begin_another)
        try:
            item = next(items)
        except StopIteration:
            return
        finally:
            guarded(fetches.end_another, before)
        yield item


def _unknown_origin(loader: Any, source: object) -> Origin:
    """Where the batches of a loader come from that tell nothing of their rows."""
    ready_made = getattr(getattr(loader, "base_dataloader", loader), "batch_sampler", None) is None
    dataset = users_own(getattr(loader, "dataset", None))
    return Origin(dataset, kind="ready-made-batch" if ready_made else "no-ids", source=source)


def _origin(packed: Any, unknown: Origin) -> Origin:
    if packed is None or unknown.kind == "failed":  # ids would be those of another dataset
        return replace(unknown, kind="failed")
    return unknown if packed is _UNTAGGED else replace(unpack(packed, unknown.dataset), source=unknown.source)


def users_own(dataset: Any) -> Any:
    """The dataset as the user has it, without the wrapper of :func:`tag`."""
    return dataset._original if isinstance(dataset, _IndexedDataset) else dataset
