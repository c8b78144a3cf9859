"""Each row's own loss, read off the backward of a batch."""

from __future__ import annotations

import math
from collections import deque
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffhook.compat.torch import saved
from diffhook.gradients import Tape

_DEPTH = 64  # nodes of the loss's graph that are looked at
_AGREES = 0.01  # relative difference between the loop's loss and the mean of the rows'
_SAME = 1e-6  # of two factors


class Reading(NamedTuple):
    """What the gradient of a prediction says of its rows' losses.

    Attributes:
        losses: (B,) float32; None: not known.
        weight: the rows' mean factor on their squared errors.
        contradicted: the loss is another one than a weighted mean of squared errors.
    """

    losses: Tensor | None
    weight: float = 1.0
    contradicted: bool = False


class PredictionGradient:
    """Watches the gradient of one prediction.

    For a loss that is the mean over the batch of w · mean((prediction − target)²) over a sample's n elements,
    ∂loss/∂prediction is 2w (prediction − target) / n: n/4 times its squared length is w² times the squared
    error. That error is found in the loss's graph where it is made there; else w = 1 is tried.

    Args:
        predicted: (B, …).
        tape: of the engine; paused while backward passes of its own run, whose gradients do not count.
        keep: keep output and gradient themselves.

    Attributes:
        output, gradient, difference: (B, …) where they are kept, the last where it is found as errors are.
        error_norms: (B,) lengths of prediction − target, by the difference and its gradient, likewise.
        errors: (B,) mean squared errors, where they are found in the loss's graph.
    """

    def __init__(self, predicted: Tensor, tape: Tape, *, keep: bool = False) -> None:
        self._tape = tape
        self.output = predicted.detach() if keep else None
        self.gradient: Tensor | None = None
        self.difference: Tensor | None = None
        self._slopes: Tensor | None = None  # (B,) lengths of the difference's gradient
        self._shape = predicted.shape
        self._elements = predicted[0].numel()
        self._squares: Tensor | None = None
        self.errors: Tensor | None = None
        predicted.register_hook(partial(tape.guard, self._collect))

    def _collect(self, gradient: Tensor) -> None:
        if not self._tape.paused:
            self._squares = gradient.detach().flatten(1).float().square().sum(1)
            self.gradient = None if self.output is None else gradient.detach()

    def find_errors(self, loss: Tensor) -> None:
        """Look for the squared error in the graph of a loss, while that still has it."""
        found = _difference(loss, self._shape)
        if found is None:
            return
        difference, node = found
        self.errors = difference.detach().flatten(1).float().square().mean(1)
        if self.output is not None:
            self.difference = difference.detach()
            node.register_hook(partial(self._tape.guard, self._on_slope))

    def _on_slope(self, inputs: tuple[Tensor | None, ...], _: Any) -> None:
        """The difference's own gradient: the output's has the factor on the output within it besides."""
        if not self._tape.paused:
            gradient = next((each for each in inputs if each is not None), None)
            self._slopes = None if gradient is None else gradient.detach().flatten(1).float().norm(dim=1)

    @property
    def error_norms(self) -> Tensor | None:
        if self.difference is None or self._slopes is None or self.gradient is None:
            return None
        factors = self.gradient.flatten(1).float().norm(dim=1) / self._slopes.clamp(min=1e-30)
        return self.difference.flatten(1).float().norm(dim=1) / factors.clamp(min=1e-30)

    def without(self, factors: Tensor) -> None:
        """The gradient was multiplied by these (B,) factors, which are not of the loop's loss."""
        if self._squares is not None:
            self._squares = self._squares / factors.to(self._squares) ** 2
        if self.gradient is not None:
            shape = (-1, *[1] * (self.gradient.dim() - 1))
            self.gradient = self.gradient / factors.to(self.gradient).view(shape)

    @property
    def found(self) -> bool:
        """Whether the loss squares this prediction's error."""
        return self.errors is not None

    def read(self, undo: float, batch_loss: float | None, parts: int = 1) -> Reading:
        """The rows' losses, if they make the batch's.

        Args:
            undo: factor that makes a gradient that of the sample's own loss.
            batch_loss: the loss that was differentiated, before the scales that are known; None: not known.
            parts: the loss is the sum of the means over so many equal parts of the batch.
        """
        if self._squares is None or batch_loss is None:
            return Reading(None)
        squares = self._squares * (undo**2 * self._elements / 4)  # w² · error
        if self.errors is None or len(self.errors) != len(squares):
            return _agreeing(squares, batch_loss, parts)  # w = 1
        weights = torch.where(self.errors > 0, (squares / self.errors).sqrt(), torch.zeros(()).to(squares))
        reading = _agreeing(weights * self.errors, batch_loss, parts)
        return reading._replace(weight=float(weights.mean()))


def _agreeing(losses: Tensor, batch_loss: float, parts: int) -> Reading:
    """The losses, if their mean is the loop's loss."""
    error = abs(float(losses.mean()) * parts - batch_loss)
    if error <= _AGREES * abs(batch_loss):
        return Reading(losses)
    return Reading(None, contradicted=math.isfinite(error))


def unexplained_factor(loss: Tensor, scale: float, accumulation: float) -> float:
    """By what the loop has multiplied its mean besides what is known, such as 1/4 for four micro-batches.

    Read off the top of the loss's graph, down to the mean. Of a loss that ends in a sum, nothing is said.

    Args:
        loss: the scalar that is differentiated.
        scale, accumulation: the factors that are known.
    """
    node, product = loss.grad_fn, 1.0
    while node is not None and (step := _constant(node)) is not None:
        product *= step
        node = next((following for following, _ in node.next_functions if following is not None), None)
    known = (1.0, scale, accumulation, scale * accumulation)
    if _sums_rows(node) or product == 0 or not math.isfinite(product):
        return 1.0
    if any(abs(product / factor - 1) < _SAME for factor in known):
        return 1.0
    return product / (scale * accumulation)


def _sums_rows(node: Any) -> bool:
    """Whether a loss is a sum: of a tensor, or as Python's ``sum`` adds up what it is given one by one."""
    while type(node).__name__ == "AddBackward0":
        terms = [following for following, _ in node.next_functions if following is not None]
        if any(type(term).__name__ in ("SelectBackward0", "UnbindBackward0") for term in terms):
            return True
        node = terms[0]
    return type(node).__name__ == "SumBackward0"


def _constant(node: Any) -> float | None:
    """The number by which a node of autograd's graph multiplies; None for another kind of node."""
    kind = type(node).__name__
    if kind in ("ToCopyBackward0", "CloneBackward0", "AliasBackward0"):
        return 1.0
    if kind not in ("MulBackward0", "DivBackward0"):
        return None
    if sum(following is not None for following, _ in node.next_functions) != 1:
        return None
    other = saved(node, "other" if node.next_functions[0][0] is not None else "self")
    if not isinstance(other, Tensor) or other.numel() != 1:
        return None
    value = float(other)
    return value if kind == "MulBackward0" else 1 / value if value else None


def _difference(loss: Tensor, shape: torch.Size) -> tuple[Tensor, Any] | None:
    """± (prediction − target), where the graph of a loss squares it, and the node that does.

    Of ``shape``, or unpacked from it.
    """
    waiting: deque[Any] = deque([loss.grad_fn])
    seen: set[Any] = set()
    while waiting and len(seen) < _DEPTH:
        node = waiting.popleft()
        if node is None or node in seen:
            continue
        seen.add(node)
        found = _squared_by(node)
        if found is not None and found.dim() and (len(found), found.numel()) == (shape[0], shape.numel()):
            return found, node
        waiting.extend(following for following, _ in node.next_functions)
    return None


def _squared_by(node: Any) -> Tensor | None:
    """What a node of autograd's graph squares, where it saves that."""
    kind, squared = type(node).__name__, saved(node, "self")
    if kind == "MseLossBackward0":
        target = saved(node, "target")
        return None if squared is None or target is None else squared - target
    return squared if kind == "PowBackward0" and saved(node, "exponent") == 2 else None
