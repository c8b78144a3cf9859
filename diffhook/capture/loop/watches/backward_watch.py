"""Sees autograd come and go, whoever calls it: Accelerate, the loop's ``loss.backward()``, or others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffhook.capture.loop.events import BackwardBegan, BackwardEnded, Event
from diffhook.capture.loop.watches.attachment import Attachment
from diffhook.compat.torch import in_backward


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

    def _began(
        self,
        tensors: Any,
        grad_tensors: Any = None,
        retain_graph: Any = None,
        create_graph: Any = False,
        grad_variables: Any = None,
        inputs: Any = None,
    ) -> None:
        if in_backward():
            return
        only = None if inputs is None else (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
        self._emit(
            BackwardBegan(_scalar(tensors, grad_tensors), _factor(tensors, grad_tensors), only or None)
        )

    def _ended(self, *_: Any, **__: Any) -> None:
        if not in_backward():
            self._emit(BackwardEnded(False))

    def _failed(self, *_: Any, **__: Any) -> None:
        if not in_backward():
            self._emit(BackwardEnded(True))


def _single(given: Any) -> Any:
    return given[0] if isinstance(given, tuple | list) and len(given) == 1 else given


def _scalar(tensors: Any, grad_tensors: Any) -> Tensor | None:
    """The loss, where autograd starts from one number alone."""
    loss, gradient = _single(tensors), _single(grad_tensors)
    return loss if isinstance(loss, Tensor) and loss.numel() == 1 and gradient is None else None


def _factor(tensors: Any, grad_tensors: Any) -> float:
    """By what a loss for each row is multiplied, of ``losses.backward(gradient)``; 1 for their mean."""
    losses, gradient = _single(tensors), _single(grad_tensors)
    if not isinstance(losses, Tensor) or not isinstance(gradient, Tensor) or losses.numel() < 2:
        return 1.0
    first = gradient.flatten()[0]
    return float(first) * losses.numel() if bool((gradient == first).all()) and bool(first) else 1.0
