"""What we hang on someone else's training run, and how it comes off again."""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

_attached: weakref.WeakSet[Attachment] = weakref.WeakSet()


class Shield:
    """Runs our code inside someone's training: an exception of ours goes to a handler, not to the loop.

    Args:
        handler: a method that is called with the exception, and may raise it; held weakly.
    """

    def __init__(self, handler: Callable[[Exception], None]) -> None:
        self._handler = weakref.WeakMethod(handler)

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            handler = self._handler()
            if handler is not None:
                handler(error)
            return None


class Attachment:
    """Everything of one capture that hangs on objects of others.

    Hooks hold weak references: garbage collection detaches them. One attachment at a time is on an object:
    the next one to :meth:`own` it sees the earlier off, whose run has died.

    Args:
        shield: through which every hook of ours runs.
        on_detach: a method that is called when another attachment takes over; held weakly.
    """

    def __init__(self, shield: Shield, on_detach: Callable[[], None]) -> None:
        self.shield = shield
        self._on_detach = weakref.WeakMethod(on_detach)
        self._undo: list[Callable[[], Any]] = []
        self._hosts: list[Any] = []
        _attached.add(self)

    def own(self, host: Any) -> None:
        """Be the only attachment of ``host``; an earlier one is detached.

        Args:
            host: an object, or a tuple that names something, such as a log's place and a rank.
        """
        for other in list(_attached):
            if other is not self and any(_same(host, its) for its in other._hosts):
                seen_off = other._on_detach()
                if seen_off is not None:
                    seen_off()
        self._hosts.append(host)

    def on_detach(self, undo: Callable[[], Any]) -> None:
        """Have ``undo`` called at :meth:`detach`, the last one first."""
        self._undo.append(undo)

    def detach(self) -> None:
        """Take everything off. What fails does not keep the rest from being undone."""
        _attached.discard(self)
        with ExitStack() as undoing:
            for undo in self._undo:
                undoing.callback(undo)
            self._undo.clear()
            self._hosts.clear()

    def hook(
        self, method: Callable[..., Any], register: Callable[[Callable[..., Any]], RemovableHandle]
    ) -> Callable[[], None]:
        """Hang a method of ours somewhere, until :meth:`detach`. Returns how to take it off earlier.

        Args:
            method: of an object that may become garbage.
            register: hangs a hook, and returns the handle that takes it off.
        """
        hook = _WeakHook(method, register, self.shield)
        self.on_detach(hook.remove)
        return hook.remove

    def replace(
        self,
        owner: Any,
        name: str,
        *,
        before: Callable[..., Any] | None = None,
        after: Callable[..., Any] | None = None,
    ) -> None:
        """Have methods of ours called around a method of one object, until :meth:`detach`.

        The original is called once, whatever becomes of ours, and its exceptions pass.

        Args:
            owner, name: whose method.
            before: called with its arguments; may return other (args, kwargs) for it, or None.
            after: called with (result, \\*args, \\*\\*kwargs), the arguments as the caller gave them.
        """
        own, original = vars(owner).get(name), getattr(owner, name)
        ours = [None if method is None else weakref.WeakMethod(method) for method in (before, after)]
        shield = self.shield

        @functools.wraps(original)  # callers look at signatures
        def replaced(*args: Any, **kwargs: Any) -> Any:
            first, then = (None if reference is None else reference() for reference in ours)
            given = None if first is None else shield(first, *args, **kwargs)
            result = original(*args, **kwargs) if given is None else original(*given[0], **given[1])
            if then is not None:
                shield(then, result, *args, **kwargs)
            return result

        def undo() -> None:
            ours[:] = [None, None]
            if owner.__dict__.get(name) is not replaced:  # someone has put theirs over ours
                return
            if own is None:
                del owner.__dict__[name]
            else:
                owner.__dict__[name] = own

        owner.__dict__[name] = replaced
        self.on_detach(undo)


class _WeakHook:
    """Calls a bound method as long as its object is there; keeps nobody alive."""

    def __init__(
        self,
        method: Callable[..., Any],
        register: Callable[[Callable[..., Any]], RemovableHandle],
        shield: Shield,
    ) -> None:
        self._method = weakref.WeakMethod(method)
        self._shield = shield
        # Reached from where the hook hangs: of garbage, weak references such as the handle's die first.
        self._handle = register(self)

    @torch.compiler.disable  # or it would trace all of us before a compiled model is refused
    def __call__(self, *args: Any, **kwargs: Any) -> None:
        method = self._method()
        if method is not None:
            self._shield(method, *args, **kwargs)

    def remove(self) -> None:
        self._handle.remove()


def close_at_exit(close: Callable[[], None]) -> None:
    """Have a method called when the interpreter ends, unless its object is gone by then."""
    method, process = weakref.WeakMethod(close), os.getpid()

    def at_exit() -> None:
        found = method()
        if found is not None and os.getpid() == process:  # a DataLoader's worker is not the run
            found()

    # Not atexit: by then the thread pools that zarr writes through are gone.
    threading._register_atexit(at_exit)  # type: ignore[attr-defined]


def _same(host: Any, other: Any) -> bool:
    return host is other or (isinstance(host, tuple) and isinstance(other, tuple) and host == other)
