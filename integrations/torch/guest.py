"""How we behave in someone else's training run."""

from __future__ import annotations

import functools
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

from diffhook.errors import ConfigurationError, LogError

logger = logging.getLogger("diffhook")


class Guest:
    """Something attached to a training run: leaves no trace, and never breaks what it watches.

    Args:
        strict: raise our own errors instead of logging them.
        enabled: False is closed from the start.
    """

    def __init__(self, *, strict: bool, enabled: bool) -> None:
        self.strict = strict
        self.closed = not enabled
        self.started = False  # training is under way: from now on nothing of ours may stop it
        self._undo: list[Callable[[], None]] = []
        self._process = os.getpid()
        if enabled:
            self._close_at_exit()

    def finish(self) -> None:
        """Write and say what is left to. By default nothing."""

    def release(self) -> None:
        """Let go of files and threads, whatever has happened. By default nothing."""

    def close(self) -> None:
        """Write what is left and leave everything as it was before us.

        Idempotent; also called at the end of training, on leaving a ``with`` block and at
        interpreter exit.
        """
        if self.closed or os.getpid() != self._process:  # a DataLoader worker is not the run
            return
        try:
            with self.guarded():
                self.finish()
        finally:
            self.detach()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def detach(self) -> None:
        """Take everything of ours off; what has been written is kept."""
        self.closed = True
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        self.release()

    def later(self, undo: Callable[[], Any]) -> None:
        """Have ``undo`` called when we leave, the last one first."""
        self._undo.append(undo)

    def replace(self, owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
        """Put ``wrapper(original, …)`` over a method of one object, until we leave."""
        own = vars(owner).get(name)
        owner.__dict__[name] = functools.partial(wrapper, getattr(owner, name))
        if own is None:
            self.later(functools.partial(owner.__dict__.pop, name, None))
        else:
            self.later(functools.partial(owner.__dict__.__setitem__, name, own))

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """An error of ours ends the capture, not the training."""
        if self.closed:
            yield
            return
        try:
            yield
        except Exception as error:
            # Bad use is told before the first step, while nothing is lost by stopping there.
            bad_use = isinstance(error, ConfigurationError | LogError) and not self.started
            if not (self.strict or bad_use):
                logger.error(
                    "diffhook has stopped capturing; training goes on. %s: %s",
                    type(error).__name__,
                    error,
                    exc_info=error,
                )
            self.detach()
            if self.strict or bad_use:
                raise

    def _close_at_exit(self) -> None:
        reference = weakref.ref(self)

        def at_exit() -> None:
            guest = reference()
            if guest is not None:
                guest.close()

        # Not atexit: by then the thread pools that zarr writes through are gone.
        threading._register_atexit(at_exit)  # type: ignore[attr-defined]
