"""Sees autograd come and go, whoever calls it: Accelerate, the loop's ``loss.backward()``, or others."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffhook.capture.loop.attachment import Attachment
from diffhook.capture.loop.events import BackwardBegan, BackwardEnded, Event


class BackwardWatch:
    """While armed, ``torch.autograd.backward`` tells of its calls; ``Tensor.backward`` goes through it.

    Not ``torch.autograd.grad``: what it returns is no gradient that an optimiser's step will use. It is armed
    from a captured forward to the end of its backward only.

    Args:
        attachment: through whose shield events are emitted.
        emit: called with events.
    """

    def __init__(self, attachment: Attachment, emit: Callable[[Event], None]) -> None:
        self._shield = attachment.shield
        self._emit = emit
        self._undo: Callable[[], None] | None = None
        self.running = False  #: a backward is under way
        attachment.on_detach(self.disarm)

    def arm(self) -> None:
        """Watch the next backward."""
        if self._undo is None:
            self._undo = _put_over(weakref.ref(self))

    def disarm(self) -> None:
        """``torch.autograd.backward`` is as it was."""
        undo, self._undo = self._undo, None
        if undo is not None:
            undo()

    def began(self, tensors: Any, grad_tensors: Any) -> None:
        self.running = True
        self._shield(self._tell, tensors, grad_tensors)

    def _tell(self, tensors: Any, grad_tensors: Any) -> None:
        self._emit(BackwardBegan(_scalar(tensors, grad_tensors)))

    def ended(self, failed: bool) -> None:
        self.running = False
        self._shield(self._emit, BackwardEnded(failed))


def _put_over(reference: weakref.ref[BackwardWatch]) -> Callable[[], None]:
    original = torch.autograd.backward

    @functools.wraps(original)
    def backward(tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> Any:
        watch = reference()
        if (
            watch is None or watch.running or not armed
        ):  # within a backward, reentrant checkpointing runs others
            return original(tensors, grad_tensors, *args, **kwargs)
        watch.began(tensors, grad_tensors)
        failed = True
        try:
            result = original(tensors, grad_tensors, *args, **kwargs)
            failed = False
        finally:
            watch.ended(failed)
        return result

    def undo() -> None:
        armed.clear()
        if torch.autograd.backward is backward:  # else someone has put theirs over ours, which stays, mute
            torch.autograd.backward = original

    armed = [True]
    torch.autograd.backward = backward
    return undo


def _scalar(tensors: Any, grad_tensors: Any) -> Tensor | None:
    """The loss, where autograd starts from one number alone."""
    given = tensors if isinstance(tensors, Tensor) else tensors[0] if len(tensors) == 1 else None
    if not isinstance(given, Tensor) or given.numel() != 1 or _holds_tensor(grad_tensors):
        return None
    return given


def _holds_tensor(grad_tensors: Any) -> bool:
    values = grad_tensors if isinstance(grad_tensors, tuple | list) else [grad_tensors]
    return any(isinstance(value, Tensor) for value in values)
