"""How we behave in someone else's training run."""

from __future__ import annotations

import functools
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Self

import torch
from torch.utils.hooks import RemovableHandle

from diffhook.errors import ConfigurationError, DiffHookError, LogError

logger = logging.getLogger("diffhook")

_present: weakref.WeakSet[Attachment] = weakref.WeakSet()


class Attachment:
    """Something attached to a training run: leaves no trace, and never breaks what it watches.

    One guest at a time is on an object: the next one to :meth:`claim` it sees the earlier off, whose
    run has died. What a guest puts on others does not keep it alive, and it leaves when it is
    garbage.

    Args:
        strict: raise our own errors instead of logging them.
        enabled: False is closed from the start.
    """

    def __init__(self, *, strict: bool, enabled: bool) -> None:
        self.strict = strict
        self.closed = not enabled
        self.started = False  # training is under way: from now on nothing of ours may stop it
        self._undo: list[Callable[[], None]] = []
        self._hosts: list[Any] = []
        self._process = os.getpid()
        if enabled:
            _present.add(self)
            self._close_at_exit()

    def finish(self) -> None:
        """Write and say what is left to. By default nothing."""

    def release(self, *, mid_pass: bool) -> None:
        """Let go of files and threads, whatever has happened. By default nothing.

        Args:
            mid_pass: the training goes on, perhaps with the backward of a forward that we have seen.
        """

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

    def __del__(self) -> None:
        if not getattr(self, "closed", True) and os.getpid() == self._process:
            self.detach()

    def claim(self, host: Any) -> None:
        """Be the only guest of ``host``. An earlier one leaves with what it has; its weights may be
        others by now, so it takes no last snapshot.

        Args:
            host: an object, or a tuple that names something, such as a log's place and a rank.
        """
        for other in list(_present):
            if other is not self and any(_same(host, its) for its in other._hosts):
                other.detach()
        self._hosts.append(host)

    def detach(self, *, mid_pass: bool = False) -> None:
        """Take everything of ours off; what has been captured is kept."""
        self.closed = True
        _present.discard(self)
        try:
            with ExitStack() as undoing:  # what fails does not keep the others from being undone
                for undo in self._undo:
                    undoing.callback(undo)
        finally:
            self._undo.clear()
            self._hosts.clear()
            self.release(mid_pass=mid_pass)

    def later(self, undo: Callable[[], Any]) -> None:
        """Have ``undo`` called when we leave, the last one first."""
        self._undo.append(undo)

    def replace(self, owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
        """Put our method ``wrapper(original, …)`` over a method of one object, until we leave."""
        own, original = vars(owner).get(name), getattr(owner, name)
        ours = weakref.WeakMethod(wrapper)

        @functools.wraps(original)  # callers look at signatures
        def replaced(*args: Any, **kwargs: Any) -> Any:
            found = ours()
            if found is None or found.__self__.closed:  # type: ignore[attr-defined]
                return original(*args, **kwargs)
            return found(original, *args, **kwargs)

        def undo() -> None:
            if owner.__dict__.get(name) is not replaced:  # someone has put theirs over ours
                return
            if own is None:
                del owner.__dict__[name]
            else:
                owner.__dict__[name] = own

        owner.__dict__[name] = replaced
        self.later(undo)

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
            told = isinstance(error, DiffHookError) and error.told
            if not (self.strict or bad_use):
                logger.log(
                    logging.INFO if told else logging.ERROR,
                    "diffhook has stopped capturing; training goes on. %s: %s",
                    type(error).__name__,
                    error,
                    exc_info=None if told else error,
                )
            stops = self.strict or bad_use
            self.detach(mid_pass=not stops)
            if stops:
                raise

    def _close_at_exit(self) -> None:
        reference = weakref.ref(self)

        def at_exit() -> None:
            guest = reference()
            if guest is not None:
                guest.close()

        # Not atexit: by then the thread pools that zarr writes through are gone.
        threading._register_atexit(at_exit)  # type: ignore[attr-defined]


class Weak:
    """Calls a bound method as long as its object is there; keeps nobody alive.

    Args:
        method: of an object that may become garbage.
        register: hangs a hook somewhere, and returns the handle that takes it off.
    """

    def __init__(
        self, method: Callable[..., Any], register: Callable[[Callable[..., Any]], RemovableHandle]
    ) -> None:
        self._method = weakref.WeakMethod(method)
        # Reached from where the hook hangs: of garbage, weak references such as the handle's die first.
        self._handle = register(self)

    @torch.compiler.disable  # or it would trace all of us before a compiled model is refused
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        method = self._method()
        return None if method is None else method(*args, **kwargs)

    def remove(self) -> None:
        self._handle.remove()


def _same(host: Any, other: Any) -> bool:
    return host is other or (isinstance(host, tuple) and isinstance(other, tuple) and host == other)
