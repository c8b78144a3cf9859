"""Sees autograd come and go, whoever calls it: Accelerate, the loop's ``loss.backward()``, or others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffhook.capture.loop.attachment import Attachment
from diffhook.capture.loop.events import BackwardBegan, BackwardEnded, Event
from diffhook.gradients import in_backward


class BackwardWatch:
    """While armed, ``torch.autograd.backward`` tells of its calls; ``Tensor.backward`` goes through it.

    Not ``torch.autograd.grad``: what it returns is no gradient that an optimiser's step will use. It is armed
    from a captured forward to the end of its backward only. Others that run within a backward, as reentrant
    checkpointing's do, are parts of it.

    Args:
        attachment: holds what we put over torch's functions.
        emit: called with events.
        pause: called before ``Tensor.backward``, within which a function mode cannot be taken off.
    """

    def __init__(
        self, attachment: Attachment, emit: Callable[[Event], None], pause: Callable[[], None]
    ) -> None:
        self._attachment = attachment
        self._emit = emit
        self._pause = pause
        self._undo: list[Callable[[], None]] = []

    def arm(self) -> None:
        """Watch the next backward."""
        if not self._undo:
            self._undo = [
                self._attachment.replace(
                    torch.autograd, "backward", before=self._began, after=self._ended, failed=self._failed
                ),
                self._attachment.replace(Tensor, "backward", before=self._called),
            ]

    def disarm(self) -> None:
        """``torch.autograd.backward`` is as it was; the end of one that has begun is still told."""
        while self._undo:
            self._undo.pop()()

    def _called(self, *_: Any, **__: Any) -> None:
        self._pause()

    def _began(self, tensors: Any, grad_tensors: Any = None, *_: Any, **__: Any) -> None:
        if not in_backward():
            self._emit(BackwardBegan(_scalar(tensors, grad_tensors)))

    def _ended(self, *_: Any, **__: Any) -> None:
        if not in_backward():
            self._emit(BackwardEnded(False))

    def _failed(self, *_: Any, **__: Any) -> None:
        if not in_backward():
            self._emit(BackwardEnded(True))


def _scalar(tensors: Any, grad_tensors: Any) -> Tensor | None:
    """The loss, where autograd starts from one number alone."""
    given = tensors if isinstance(tensors, Tensor) else tensors[0] if len(tensors) == 1 else None
    if not isinstance(given, Tensor) or given.numel() != 1 or _holds_tensor(grad_tensors):
        return None
    return given


def _holds_tensor(grad_tensors: Any) -> bool:
    values = grad_tensors if isinstance(grad_tensors, tuple | list) else [grad_tensors]
    return any(isinstance(value, Tensor) for value in values)
