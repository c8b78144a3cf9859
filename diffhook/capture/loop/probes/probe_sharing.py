"""Probes shared by the processes of a run, by the store through which they found each other."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

logger = logging.getLogger("diffhook")

_PAUSE = 0.01  # seconds between two looks
_COMING = 30.0  # seconds that the others wait for the first process's snapshot
_LONGEST = 600.0  # for terms that the first one has yet to find, and the first one for those still measuring
_COMING_SOON = b"soon"  # in place of terms


class SharedProbe:
    """One process's end; see :class:`~diffhook.capture.probes.prober.Sharing`.

    Args:
        store: a ``torch.distributed`` store. One that is gone shares nothing more.
    """

    def __init__(self, store: Any) -> None:
        self._store = store

    def begin(self, step: int) -> None:
        with suppress(RuntimeError):
            self._store.set(f"probe-{step}", _COMING_SOON)

    def offer(self, step: int, terms: Mapping[str, Any] | None) -> None:
        with suppress(RuntimeError):
            self._store.set(f"probe-{step}", json.dumps(terms))

    def terms(self, step: int) -> Mapping[str, Any] | None:
        with suppress(RuntimeError):
            key = f"probe-{step}"
            if not _waited(lambda: self._store.check([key]), _COMING):
                return None
            if not _waited(lambda: self._store.get(key) != _COMING_SOON, _LONGEST):
                return None
            found: Mapping[str, Any] | None = json.loads(self._store.get(key))
            if found is not None:
                self._store.add(f"joined-{step}", 1)
            return found
        return None

    def claim(self, step: int, sample: int) -> bool:
        with suppress(RuntimeError):
            return bool(self._store.add(f"sample-{step}-{sample}", 1) == 1)
        return False

    def done(self, step: int) -> None:
        with suppress(RuntimeError):
            self._store.add(f"done-{step}", 1)

    def settle(self, step: int) -> None:
        with suppress(RuntimeError):
            joined = self._store.add(f"joined-{step}", 0)
            if not _waited(lambda: self._store.add(f"done-{step}", 0) >= joined, _LONGEST):
                logger.warning("other processes are still probing the snapshot of step %d", step)


def _waited(for_what: Callable[[], bool], seconds: float) -> bool:
    until = time.monotonic() + seconds
    while not for_what():
        if time.monotonic() > until:
            return False
        time.sleep(_PAUSE)
    return True
