"""Each row's own loss, read off the backward of a batch."""

from __future__ import annotations

import math
from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffhook.gradients import Tape

_DEPTH = 64  # nodes of the loss's graph that are looked at
_AGREES = 0.01  # relative difference between the loop's loss and the mean of the rows'
_ROUND = {torch.float32: 2e-4, torch.float64: 1e-6}  # how near a factor on the loss is to a whole number
_ROUND_HALF = 3e-3
_LARGEST_FACTOR = 1 << 16


class Reading(NamedTuple):
    """What the gradient of a prediction says of its rows' losses.

    Attributes:
        losses: (B,) float32; None: not known.
        factor: by which the loop has multiplied its loss before the backward: 8, or 1/4 for four
            micro-batches a step.
        contradicted: the loss is another one than a weighted mean of squared errors.
    """

    losses: Tensor | None
    factor: float = 1.0
    contradicted: bool = False


class PredictionGradient:
    """Watches the gradient of one prediction.

    For a loss that is the mean over the batch of w · mean((prediction − target)²) over a sample's n elements,
    ∂loss/∂prediction is 2w (prediction − target) / n: n/4 times its squared length is w² times the squared
    error. That error is found in the loss's graph where it is made there; else w = 1 is tried.

    Args:
        predicted: (B, …).
        tape: of the engine; paused while backward passes of its own run, whose gradients do not count.
    """

    def __init__(self, predicted: Tensor, tape: Tape) -> None:
        self._tape = tape
        self._shape = predicted.shape
        self._dtype = predicted.dtype
        self._elements = predicted[0].numel()
        self._squares: Tensor | None = None
        self._errors: Tensor | None = None  # (B,) mean squared errors
        predicted.register_hook(self._collect)

    def _collect(self, gradient: Tensor) -> None:
        if not self._tape.paused:
            self._squares = gradient.detach().flatten(1).float().square().sum(1)

    def find_errors(self, loss: Tensor) -> None:
        """Look for the squared error in the graph of a loss, while that still has it."""
        difference = _difference(loss, self._shape)
        if difference is not None:
            self._errors = difference.detach().flatten(1).float().square().mean(1)

    def read(self, undo: float, batch_loss: float | None, parts: int = 1) -> Reading:
        """The rows' losses, if they make the batch's.

        Args:
            undo: factor that makes a gradient that of the sample's own loss, but for what the loop multiplies
                it by unseen.
            batch_loss: the loss that was differentiated, before the scales that are known; None: not known.
            parts: the loss is the sum of the means over so many equal parts of the batch.
        """
        if self._squares is None or batch_loss is None:
            return Reading(None)
        squares = self._squares * (undo**2 * self._elements / 4)  # w² · error
        if self._errors is None or len(self._errors) != len(squares):
            return self._without_errors(squares, batch_loss, parts)
        weights = torch.where(self._errors > 0, (squares / self._errors).sqrt(), torch.zeros(()).to(squares))
        losses = weights * self._errors
        error = abs(float(losses.mean()) * parts - batch_loss)
        if not error <= _AGREES * abs(batch_loss):
            return Reading(None, contradicted=math.isfinite(error))
        low, high = float(weights.min()), float(weights.max())
        factor = self._round(high) if low > 0 and high / low - 1 < 2 * self._tolerance else 1.0
        return Reading(losses / factor, factor)

    def _without_errors(self, squares: Tensor, batch_loss: float, parts: int) -> Reading:
        mean = float(squares.mean()) * parts
        error = abs(mean - batch_loss)
        if error <= _AGREES * abs(batch_loss):
            return Reading(squares)
        factor = self._round(mean / batch_loss) if batch_loss else 1.0
        if factor == 1:
            return Reading(None, contradicted=math.isfinite(error))
        return Reading(squares / factor**2, factor)

    @property
    def _tolerance(self) -> float:
        return _ROUND.get(self._dtype, _ROUND_HALF)

    def _round(self, factor: float) -> float:
        """``factor`` where it or its inverse is a whole number; else 1: it is part of the loss."""
        if not math.isfinite(factor) or not 1 / _LARGEST_FACTOR < factor < _LARGEST_FACTOR:
            return 1.0
        whole = factor if factor > 1 else 1 / factor
        if abs(whole / round(whole) - 1) > self._tolerance:
            return 1.0
        return float(round(whole)) if factor > 1 else 1 / round(whole)


def _difference(loss: Tensor, shape: torch.Size) -> Tensor | None:
    """prediction − target, of ``shape``, where the graph of a loss squares it."""
    waiting: deque[Any] = deque([loss.grad_fn])
    seen: set[Any] = set()
    while waiting and len(seen) < _DEPTH:
        node = waiting.popleft()
        if node is None or node in seen:
            continue
        seen.add(node)
        found = _squared_by(node)
        if found is not None and found.shape == shape:
            return found
        waiting.extend(following for following, _ in node.next_functions)
    return None


def _squared_by(node: Any) -> Tensor | None:
    """What a node of autograd's graph squares, where it saves that."""
    kind = type(node).__name__
    try:
        if kind == "MseLossBackward0":
            return node._saved_self - node._saved_target
        if kind == "PowBackward0" and node._saved_exponent == 2:
            return node._saved_self
    except (AttributeError, RuntimeError):  # another version's node, or its tensors were freed
        return None
    return None
