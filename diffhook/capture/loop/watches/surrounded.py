"""A function of others while methods of ours are called around it."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diffhook.gradients import Guard

Weak = weakref.WeakMethod[Callable[..., Any]]


@dataclass(frozen=True, eq=False)
class Layer:
    """What one capture has called around a function; held weakly, and run through its shield.

    Args:
        before, after, failed: as for :meth:`diffhook.capture.loop.watches.attachment.Attachment.replace`.
    """

    shield: Guard
    before: Weak | None
    after: Weak | None
    failed: Weak | None

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = self.shield(call_if_there, self.before, *args, **kwargs)
        try:
            result = function(*args, **kwargs) if given is None else function(*given[0], **given[1])
        except BaseException:
            self.shield(call_if_there, self.failed, *args, **kwargs)
            raise
        self.shield(call_if_there, self.after, result, *args, **kwargs)
        return result


class Surrounded:
    """Stands in for a function of one object, and calls it within its layers, the newest outermost.

    Two captures of one process may watch the same function and leave in any order: it has one stand-in, which
    comes with its first layer and goes with its last.

    Args:
        owner, name: whose function.
    """

    def __init__(self, owner: Any, name: str) -> None:
        self._owner, self._name = owner, name
        self._own = vars(owner).get(name)
        original = getattr(owner, name)
        layers: list[Layer] = []

        @functools.wraps(original)  # callers look at signatures
        def stand_in(*args: Any, **kwargs: Any) -> Any:
            within = original
            for layer in layers:
                within = functools.partial(layer, within)
            return within(*args, **kwargs)

        self._layers, self._stand_in = layers, stand_in
        stand_in.surrounded = self  # type: ignore[attr-defined]

    @classmethod
    def of(cls, owner: Any, name: str) -> Surrounded:
        """That which stands there already, unless someone has put theirs over it."""
        found = vars(owner).get(name)
        known = getattr(found, "surrounded", None)  # functools.wraps copies it to wrappers of others
        return known if isinstance(known, cls) and known._stand_in is found else cls(owner, name)

    def add(self, layer: Layer) -> None:
        """Call the function within ``layer``, too."""
        self._layers.append(layer)
        if len(self._layers) == 1:
            setattr(self._owner, self._name, self._stand_in)

    def remove(self, layer: Layer) -> None:
        """No longer: a call under way stays in it."""
        if layer in self._layers:
            self._layers.remove(layer)
        if not self._layers:
            self._restore()

    def _restore(self) -> None:
        if vars(self._owner).get(self._name) is not self._stand_in:  # someone has put theirs over ours
            return
        if self._own is None:
            delattr(self._owner, self._name)
        else:
            setattr(self._owner, self._name, self._own)


def call_if_there(method: Weak | None, *args: Any, **kwargs: Any) -> Any:
    """Call a method whose object may be gone."""
    found = None if method is None else method()
    return None if found is None else found(*args, **kwargs)
