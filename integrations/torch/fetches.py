"""Batches as a loop fetches them from its own DataLoaders, which no framework has wrapped.

The iterators of DataLoaders are listened to, and nothing is put in their place: a loop that calls ``next``,
or makes an iterator for every batch, draws the random numbers that it draws without us.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from typing import Any

from diffhook.compat.torch import LoaderIterator, fetched_dataset
from diffhook.gradients import Guarded

_listeners: list[tuple[Guarded, int]] = []  # and the thread of each
_originals: list[Any] = []  # LoaderIterator.__next__, while anybody listens
_within = threading.local()


class _Listening:
    """Has a hook told of fetches until it is removed."""

    def __init__(self, hook: Guarded) -> None:
        self._hook = hook

    def remove(self) -> None:
        """With the last one gone, torch's class is as it was."""
        _listeners[:] = [known for known in _listeners if known[0] is not self._hook]
        if not _listeners and _originals:
            LoaderIterator.__next__ = _originals.pop()  # type: ignore[method-assign]


def listen(hook: Guarded) -> _Listening:
    """Have ``hook`` called with (batch, dataset, here) at every fetch, and with None for the batch at the end
    of a pass; ``here``: it is this thread that fetches."""
    if not _originals:
        _originals.append(LoaderIterator.__next__)
        LoaderIterator.__next__ = _telling(_originals[0])  # type: ignore[method-assign,assignment]
    _listeners.append((hook, threading.get_ident()))
    return _Listening(hook)


def begin_another() -> bool:
    """From now on, what this thread fetches is for another loader, which tells of its batches itself.

    Returns:
        Whether that was so before, for :func:`end_another`.
    """
    before = getattr(_within, "other", False)
    _within.other = True
    return before


def end_another(before: bool | None) -> None:
    """The other loader has its batch."""
    _within.other = bool(before)


def _telling(fetch: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @wraps(fetch)
    def told(iterator: Any) -> Any:
        try:
            batch = fetch(iterator)
        except StopIteration:
            _tell(None, iterator)
            raise
        _tell(batch, iterator)
        return batch

    return told


def _tell(batch: Any, iterator: Any) -> None:
    if getattr(_within, "other", False):
        return
    for hook, thread in list(_listeners):
        hook(batch, fetched_dataset(iterator), thread == threading.get_ident())
