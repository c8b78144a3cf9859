"""What the processes of a run tell each other: which run it is, and when a checkpoint is being written.

Rows of all processes must reach the disk when the first one writes a checkpoint. Many scripts save on the
main process alone, and the others never hear of it. They are asked through the key-value store by which
torch's processes found each other: no collective, which the loop would have to expect. A thread answers,
since the loop of a process may wait at a barrier meanwhile.
"""

from __future__ import annotations

import itertools
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch.distributed as dist

from diffhook.capture.loop.probes.probe_sharing import SharedProbe
from diffhook.compat.torch import process_store

_PAUSE = 0.05  # seconds between two looks for a request
_PATIENCE = 10.0  # seconds that a checkpoint, or the beginning, waits for the other processes
_LEAST = 1.0  # after they did not come several times

_numbers = itertools.count()  # processes start their hooks in the same order


class Ranks:
    """One process's end of the line between the processes of a run; nothing where there is one.

    Args:
        rank, processes: this process's number, and how many there are.
        settle: a method that is called in a thread, with a number of steps. Once so many have been
            taken it sees their rows to the disk and returns True.
    """

    def __init__(self, rank: int, processes: int, settle: Callable[[int], bool]) -> None:
        self._rank, self._processes = rank, processes
        self._settle = weakref.WeakMethod(settle)
        self._store: Any = None
        self._requests = 0
        self._patience = _PATIENCE
        self._leaving = threading.Event()
        self._thread: threading.Thread | None = None
        if processes > 1 and dist.is_available() and dist.is_initialized():
            self._store = process_store(f"diffhook-{next(_numbers)}")
        #: for the prober; None where there is one process, or they cannot talk to each other
        self.shared_probe = None if self._store is None else SharedProbe(self._store)

    @property
    def probes(self) -> bool:
        """Whether this process takes part in probes."""
        return self._rank == 0 or self.shared_probe is not None

    def agree_on_run(self) -> str | None:
        """An id of this start of the run, drawn by the first process, which all of them must ask.

        Returns:
            None: there are others, and no word from the first one.
        """
        own = uuid.uuid4().hex[:16]
        if self._processes == 1:
            return own
        if self._store is None:
            return None
        if self._rank == 0:
            self._store.set("run", own)
            return own
        until = time.monotonic() + _PATIENCE
        while not self._store.check(["run"]):
            if time.monotonic() > until:
                return None
            time.sleep(_PAUSE / 10)
        return bytes(self._store.get("run")).decode()

    def listen(self) -> None:
        """Answer the first process from now on, until :meth:`leaving`."""
        if self._store is not None and self._rank > 0:
            self._thread = threading.Thread(target=self._work, name="diffhook-ranks", daemon=True)
            self._thread.start()

    def settle_all(self, step: int, *, wait: bool = True) -> list[int]:
        """Have every other process's rows of the steps before ``step`` on disk; the first one's to ask.

        Args:
            wait: until they are there.

        Returns:
            Ranks that did not answer in time.
        """
        if self._store is None or self._rank > 0:
            return []
        self._requests += 1
        self._store.set(f"request-{self._requests}", str(step))
        if not wait:
            return []
        waiting = list(range(1, self._processes))
        until = time.monotonic() + _PATIENCE
        while waiting and time.monotonic() < until:
            time.sleep(_PAUSE / 10)
            waiting = [rank for rank in waiting if not self._answered(rank)]
        return waiting

    def meet(self, what: str) -> bool:
        """Whether all processes have come to the same point, for something that they must do together.

        All get the same answer, whoever comes late or not at all: the first that knows it decides for all.

        Args:
            what: names the point.
        """
        if self._processes == 1:
            return True
        with suppress(RuntimeError):  # the store is gone, and the first process with it
            if self._store is None or not dist.is_initialized():
                return False
            verdict = f"{what}-met"
            whole = self._store.add(f"{what}-here", 1) == self._processes
            decides = whole or not self._decided(verdict, self._patience)
            if decides and self._store.add(f"{what}-deciding", 1) == 1:
                self._store.set(verdict, "yes" if whole else "no")
            met = bytes(self._store.get(verdict)) == b"yes"
            self._patience = _PATIENCE if met else max(self._patience / 2, _LEAST)
            return met
        return False

    def _decided(self, verdict: str, patience: float) -> bool:
        until = time.monotonic() + patience
        while not self._store.check([verdict]):
            gone = any(self._store.check([f"gone-{rank}"]) for rank in range(self._processes))
            if gone or time.monotonic() > until:
                return False
            time.sleep(_PAUSE / 10)
        return True

    def _answered(self, rank: int) -> bool:
        return any(self._store.check([key]) for key in (f"{self._requests}-by-{rank}", f"gone-{rank}"))

    @contextmanager
    def leaving(self) -> Iterator[None]:
        """Around the closing of this process's log, after which nobody needs to wait for it."""
        self._leaving.set()
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join(1.0)
        try:
            yield
        finally:
            if self._store is not None:
                self._tell(f"gone-{self._rank}")

    def _work(self) -> None:
        served = 0
        while not self._leaving.wait(_PAUSE):
            try:
                if self._store.check([f"request-{served + 1}"]):
                    step = int(self._store.get(f"request-{served + 1}"))
                    settle = self._settle()
                    if settle is not None and settle(step):
                        served += 1
                        self._tell(f"{served}-by-{self._rank}")
            except Exception:  # the first process has ended, or the log fails, as this one's loop will see
                return

    def _tell(self, key: str) -> None:
        with suppress(RuntimeError):
            self._store.set(key, "")
