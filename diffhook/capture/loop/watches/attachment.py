"""What we hang on someone else's training run, and how it comes off again."""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any, ParamSpec, Protocol, TypeVar

from diffhook.capture.loop.watches.surrounded import Layer, Surrounded, call_if_there
from diffhook.compat.python import before_threads_end
from diffhook.gradients import Guard, Guarded

P = ParamSpec("P")
R = TypeVar("R")

_attached: weakref.WeakSet[Attachment] = weakref.WeakSet()


class Handle(Protocol):
    """What takes a hook off."""

    def remove(self) -> None: ...


class Shield(Guard):
    """Runs our code inside someone's training: an exception of ours goes to a handler, not to the loop.

    Args:
        handler: a method that is called with the exception, and may raise it; held weakly.
    """

    def __init__(self, handler: Callable[[Exception], None]) -> None:
        self._handler = weakref.WeakMethod(handler)

    def keep(self, error: Exception) -> None:
        handler = self._handler()
        if handler is not None:
            handler(error)


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
        self._undo: list[_Undo] = []
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
        self._undo.append(_Undo(undo))

    def detach(self) -> None:
        """Take everything off. What fails does not keep the rest from being undone."""
        _attached.discard(self)
        with ExitStack() as undoing:
            for undo in self._undo:
                undoing.callback(undo)
            self._undo.clear()
            self._hosts.clear()

    def hook(
        self, method: Callable[..., Any], register: Callable[[Guarded], Handle], *, again: bool = False
    ) -> Callable[[], None]:
        """Hang a method of ours somewhere, until :meth:`detach`. Returns how to take it off earlier.

        Args:
            method: of an object that may become garbage.
            register: hangs a hook, and returns the handle that takes it off.
            again: the method may be called a second time where it has failed.
        """
        hook = _WeakHook(method, self.shield, again)
        remove = self._removable(hook.remove)
        hook.hang(register)
        return remove

    def replace(
        self,
        owner: Any,
        name: str,
        *,
        before: Callable[..., Any] | None = None,
        after: Callable[..., Any] | None = None,
        failed: Callable[..., Any] | None = None,
    ) -> Callable[[], None]:
        """Have methods of ours called around a function of one object, until :meth:`detach`.

        The original is called once, whatever becomes of ours, and its exceptions pass. Returns how to take
        them off earlier; a call under way still ends in ``after`` or ``failed``.

        Args:
            owner, name: whose function.
            before: called with its arguments; may return other (args, kwargs) for it, or None.
            after: called with (result, \\*args, \\*\\*kwargs), the arguments as the caller gave them.
            failed: called with the arguments where the original has raised.
        """
        weak = [None if method is None else weakref.WeakMethod(method) for method in (before, after, failed)]
        layer, surrounded = Layer(self.shield, *weak), Surrounded.of(owner, name)
        remove = self._removable(partial(surrounded.remove, layer))
        surrounded.add(layer)
        return remove

    def _removable(self, undo: Callable[[], None]) -> Callable[[], None]:
        self.on_detach(undo)
        kept = self._undo[-1]

        def remove() -> None:
            undo()
            if kept in self._undo:
                self._undo.remove(kept)

        return remove


class _Undo(Guarded):
    """Undoes something of ours; where that fails, it is tried again: what stays would outlive us."""

    def __init__(self, undo: Callable[[], Any]) -> None:
        self._undo = undo

    def run(self) -> None:
        self._undo()

    def failed(self, error: Exception) -> None:
        self._undo()


class _WeakHook(Guarded):
    """Calls a bound method as long as its object is there; keeps nobody alive."""

    def __init__(self, method: Callable[..., Any], shield: Shield, again: bool) -> None:
        self._method = weakref.WeakMethod(method)
        self._shield = shield
        self._again = again
        self._handle: Handle | None = None

    def hang(self, register: Callable[[Guarded], Handle]) -> None:
        # Reached from where the hook hangs: of garbage, weak references such as the handle's die first.
        self._handle = register(self)

    def run(self, *args: Any, **kwargs: Any) -> None:
        call_if_there(self._method, *args, **kwargs)

    def failed(self, error: Exception, *args: Any, **kwargs: Any) -> None:
        self._shield.keep(error)
        if self._again:
            self._shield(call_if_there, self._method, *args, **kwargs)

    def remove(self) -> None:
        if self._handle is not None:
            self._handle.remove()


def shielded(
    otherwise: Callable[[], Any] | None = None, *, again: bool = False
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A method that the loop calls, of an object with a ``capture``: what fails in it is ours.

    Args:
        otherwise: makes what the loop gets then; None by default.
        again: whether the method is called a second time, as one that must not be left undone.
    """

    def decorate(method: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(method)
        def called(self: Any, *args: Any, **kwargs: Any) -> Any:
            found = self.capture.shield(method, self, *args, **kwargs)
            if again:
                self.capture.shield(method, self, *args, **kwargs)
            return otherwise() if found is None and otherwise is not None else found

        return called  # type: ignore[return-value]

    return decorate


def close_at_exit(close: Callable[..., None]) -> None:
    """Have a method called with ``at_exit=True`` when the interpreter ends, unless its object is gone."""
    method, process = weakref.WeakMethod(close), os.getpid()

    def at_exit() -> None:
        found = method()
        if found is not None and os.getpid() == process:  # a DataLoader's worker is not the run
            with suppress(KeyboardInterrupt):  # of somebody who does not want to wait for us
                found(at_exit=True)

    before_threads_end(at_exit)


def let_go(detach: Callable[[], Any]) -> None:
    """Detach what has become garbage.

    The collector may run in a thread that rows need on their way to the disk, and which must not wait for
    itself: the log's writer, or, of a store on a network, zarr's event loop.
    """
    if threading.current_thread() is not threading.main_thread():
        with suppress(RuntimeError):  # the interpreter ends, and begins no thread any more
            threading.Thread(target=detach, name="diffhook-last").start()
            return
    detach()


def _same(host: Any, other: Any) -> bool:
    return host is other or (isinstance(host, tuple) and isinstance(other, tuple) and host == other)
