"""Each row's own loss, read off the backward of a batch."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from diffhook.capture.loop.losses.error_nodes import ErrorNode, PredictionPlace
from diffhook.compat.torch import saved
from diffhook.gradients import Tape, on_gradient

_AGREES = 0.01  # relative difference between the loop's loss and the mean of the rows'
_SAME = 1e-6  # of two factors


class Reading(NamedTuple):
    """What the gradient of a prediction says of its rows' losses.

    Attributes:
        losses: (B,) float32; None: not known.
        contradicted: the loss is no weighted mean of the prediction's errors.
    """

    losses: Tensor | None
    contradicted: bool = False


class PredictionGradient:
    """Watches the gradient of one prediction.

    Where the loss's graph takes distances of the prediction's error, what each row adds to the loss is read
    off them, whatever weighs them (:mod:`diffhook.capture.loop.losses.error_nodes`). Else it is tried whether
    the loss is the mean over the batch of mean((prediction − target)²) over a sample's n elements:
    ∂loss/∂prediction is then 2 (prediction − target) / n, and n/4 times its squared length is that error.

    Args:
        predicted: (B, …).
        tape: of the engine; paused while backward passes of its own run, whose gradients do not count.
        keep: keep output, gradient and lengths.

    Attributes:
        output, gradient: (B, …) where they are kept.
    """

    def __init__(self, predicted: Tensor, tape: Tape, *, keep: bool = False) -> None:
        self._tape, self._prediction = tape, PredictionPlace(predicted)
        self.output = predicted.detach() if keep else None
        self.gradient: Tensor | None = None
        self._errors: list[ErrorNode] = []
        self._read: list[Tensor | None] = []  # (R,) of each error: what its rows add to the loss
        self._lengths: list[Tensor | None] = []  # likewise of squares, if kept: |difference| · |its gradient|
        self._squares: Tensor | None = None
        on_gradient(predicted, tape.guard, self._collect)

    def find_errors(self, loss: Tensor) -> None:
        """Look for the prediction's errors in the graph of a loss, while that still has them."""
        found = self._prediction.errors(loss)
        self._read, self._lengths = [None] * len(found), [None] * len(found)
        for number, error in enumerate(found):
            error.node.register_hook(partial(self._tape.guard, partial(self._on_slope, number)))
        self._errors = [error._replace(node=None) for error in found]  # whose hooks hold us

    def _on_slope(self, number: int, inputs: tuple[Tensor | None, ...], _: Any) -> None:
        """The difference's own gradient: the output's has the factor on the output within it besides."""
        by_first, by_target = (*inputs, None)[:2]
        if by_first is not None:
            slope = by_first.detach()
        elif by_target is not None:
            slope = -by_target.detach()  # of target − prediction, by the prediction
        else:
            return
        if self._tape.paused:
            return
        error = self._errors[number]
        self._read[number] = error.losses(slope)
        if self.output is not None and error.squared:
            self._lengths[number] = _lengths(error.difference) * _lengths(slope)

    def _collect(self, gradient: Tensor) -> None:
        if self._tape.paused:
            return
        if self._joined(self._read) is None:
            self._squares = _lengths(gradient.detach()).square()
        self.gradient = None if self.output is None else gradient.detach()

    def _joined(self, values: list[Tensor | None]) -> Tensor | None:
        """(B,) sums over the errors of a row, of (R,) values of each error; None: some are not known."""
        known = [each for each in values if each is not None]
        rows = [error.rows for error in self._errors]
        if not known or len(known) < len(values) or not _cover(rows, self._prediction.rows):
            return None
        if len(known) == 1:
            return known[0]
        joined = known[0].new_zeros(self._prediction.rows)
        for part, value in zip(rows, known, strict=True):
            joined[part] += value
        return joined

    @property
    def error_norms(self) -> Tensor | None:
        """(B,) lengths of prediction − target, where rows have one error, squared, perhaps scaled."""
        products = self._joined(self._lengths)
        if products is None or self.gradient is None:
            return None
        if sum(error.rows.stop - error.rows.start for error in self._errors) > self._prediction.rows:
            return None
        return products / _lengths(self.gradient).clamp(min=1e-30)  # the factor c is 1/c in the difference

    def without(self, factors: Tensor) -> None:
        """The prediction's gradient was multiplied by these (B,) factors, which are not the loop's."""
        if self._squares is not None:
            self._squares = self._squares / factors.to(self._squares) ** 2
        if self.gradient is not None:
            shape = (-1, *[1] * (self.gradient.dim() - 1))
            self.gradient = self.gradient / factors.to(self.gradient).view(shape)

    @property
    def found(self) -> bool:
        """Whether the loss measures this prediction's error."""
        return bool(self._errors)

    def read(self, undo: float, batch_loss: float | None, parts: int = 1) -> Reading:
        """The rows' losses, if they make the batch's.

        Args:
            undo: factor that makes a gradient that of the sample's own loss.
            batch_loss: the loss that was differentiated, before the scales that are known; None: not known.
            parts: the loss is the sum of the means over so many equal parts of the batch.
        """
        if batch_loss is None:
            return Reading(None)
        if self._prediction.counts_otherwise:
            return Reading(None, contradicted=True)
        if (losses := self._joined(self._read)) is not None:
            return _agreeing(losses * undo, batch_loss, parts)
        if self._squares is None:
            return Reading(None)
        return _agreeing(self._squares * (undo**2 * self._prediction.elements / 4), batch_loss, parts)

    def weight(self, losses: Tensor) -> float:
        """Mean factor of these (B,) losses on the mean distances of the rows' errors; 1: not known."""
        means = self._joined([error.mean() for error in self._errors])
        if means is None or self._joined(self._read) is None:
            return 1.0
        return float((losses[means > 0] / means[means > 0]).mean())


def _lengths(values: Tensor) -> Tensor:
    """(B,) of (B, …)."""
    return values.flatten(1).float().norm(dim=1)


def _cover(parts: list[slice], rows: int) -> bool:
    """Whether the parts make all of so many rows."""
    end = 0
    for part in sorted(parts, key=lambda each: each.start):
        if part.start > end:
            return False
        end = max(end, part.stop)
    return end == rows


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
