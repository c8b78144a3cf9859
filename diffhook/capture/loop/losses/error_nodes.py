"""Where the graph of a loss measures a prediction's error, and what that says of each row's loss."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from diffhook.capture.objective.distance import Absolute, Distance, Huber, Squared
from diffhook.compat.torch import saved

_DEPTH = 256  # nodes of a graph that are looked at
_MARK = "diffhook"  # in the metadata of the nodes that made predictions


class ErrorNode(NamedTuple):
    """A distance that the graph of a loss takes of every element of a difference.

    Attributes:
        node: of autograd's graph, whose input the difference is.
        difference: (R, …) ± (prediction − target), perhaps scaled.
        losses: the gradient of the batch's loss by the difference → (R,) what the rows have added to it, if
            it is a weighted sum of those distances.
        distances: the difference → (R, …) them; None: up to a factor that is not known.
        rows: of the prediction, which the R are.
        squared: the distance is the square, so that its slope has the direction of the difference.
    """

    node: Any
    difference: Tensor
    losses: Callable[[Tensor], Tensor]
    distances: Callable[[Tensor], Tensor] | None = None
    rows: slice = slice(0, 0)
    squared: bool = False

    def mean(self) -> Tensor | None:
        """(R,) mean distances."""
        return None if self.distances is None else self.distances(self.difference.float()).flatten(1).mean(1)


class PredictionPlace:
    """A prediction's place in the graph that a loss will have. Holds no part of it, which would never go.

    Args:
        predicted: (B, …).

    Attributes:
        counts_otherwise: the loss found last depends on it beside its errors too, as where variances that it
            predicts have a term of their own.
    """

    def __init__(self, predicted: Tensor) -> None:
        self.counts_otherwise = False
        self.rows, self.elements = len(predicted), predicted[0].numel()
        self._mark = object()
        node: Any = predicted.grad_fn
        if node is not None:
            node.metadata.setdefault(_MARK, []).append(self._mark)

    def made_by(self, node: Any) -> bool:
        """Whether the prediction came from a node of the graph."""
        return any(mark is self._mark for mark in node.metadata.get(_MARK, ()))

    def errors(self, loss: Tensor) -> list[ErrorNode]:
        """Its errors in the graph of a loss, while that still has what it saved.

        A difference has as many numbers as the prediction, in whatever shape; or half of them, where the
        others are variances. Several may share the rows, as the halves of prior preservation do.
        """
        found: list[ErrorNode] = []
        directly: list[Any] = []

        def is_error(node: Any) -> bool:
            if self.made_by(node):
                directly.append(node)
                return True
            error = _measured(node)
            rows = None if error is None else self._rows_of(error)
            if error is None or rows is None:
                return False
            found.append(error._replace(rows=rows))
            return True

        for _ in _below(loss.grad_fn, is_error):
            pass
        self.counts_otherwise = bool(found and directly)
        return found

    def _rows_of(self, error: ErrorNode) -> slice | None:
        """Which of the prediction's a difference has; None: none, or it is not known which."""
        rows = len(error.difference)
        own = error.difference[0].numel() if rows else 0
        if rows > self.rows or own not in (self.elements, self.elements / 2):
            return None
        taken, reached = slice(0, self.rows), False
        for node, number in _below(error.node, self.made_by):
            reached = reached or self.made_by(node)
            if self.made_by(node) or not _moves_rows(node):
                continue
            part = _taken(node, number, self.rows)
            if part is None or len(range(self.rows)[taken]) < self.rows:
                return None
            taken = part
        return taken if reached and taken.stop - taken.start == rows else None


def _below(top: Any, stops: Callable[[Any], bool]) -> Iterator[tuple[Any, int]]:
    """A node of the graph and those below it, breadth first, each with the number of its output; but none
    below those that it ``stops`` at."""
    waiting: deque[tuple[Any, int]] = deque([(top, 0)])
    seen: set[Any] = set()
    while waiting and len(seen) < _DEPTH:
        node, number = waiting.popleft()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node, number
        if not stops(node):
            waiting.extend(node.next_functions)


# ── nodes that choose or move rows ────────────────────────────────────────────────────────────────

_ALONG_AN_AXIS = {
    "Split",
    "SplitWithSizes",
    "Slice",
    "Cat",
    "Stack",
    "Select",
    "IndexSelect",
    "Unbind",
    "Gather",
}
_OF_AXES = {"Flip", "Roll"}
_ANYWHERE = {"Index", "IndexPut", "MaskedSelect", "Repeat", "Sort", "T", "Rot90", "AsStrided", "Unfold"}


def _moves_rows(node: Any) -> bool:
    """Whether row i of a node's output may be another than row i of its input."""
    kind = type(node).__name__.partition("Backward")[0]
    if kind in _ALONG_AN_AXIS:
        return bool(saved(node, "dim") == 0)
    if kind in _OF_AXES:
        return 0 in (saved(node, "dims") or (0,))
    if kind == "Permute":
        return bool(saved(node, "dims")[0] != 0)
    if kind == "Transpose":
        return 0 in (saved(node, "dim0"), saved(node, "dim1"))
    return kind in _ANYWHERE


def _taken(node: Any, number: int, rows: int) -> slice | None:
    """The rows that a node takes out of a tensor of so many, if they follow one another.

    Args:
        number: of its output that is meant.
    """
    kind, sizes = type(node).__name__, saved(node, "self_sym_sizes")
    if not sizes or sizes[0] != rows:
        return None
    if kind == "SplitBackward0":  # also of torch.chunk
        size = int(saved(node, "split_size"))
        return slice(number * size, min((number + 1) * size, rows))
    if kind == "SplitWithSizesBackward0":
        parts = [int(size) for size in saved(node, "split_sizes")]
        return slice(sum(parts[:number]), sum(parts[: number + 1]))
    if kind == "SliceBackward0" and saved(node, "step") == 1:
        start, end = (int(saved(node, name) or 0) for name in ("start", "end"))
        return slice(*slice(_signed(start), _signed(end)).indices(rows)[:2])
    return None


def _signed(number: int) -> int:
    """What torch shows as a number without a sign."""
    return number if number < 1 << 63 else number - (1 << 64)


# ── nodes that measure ────────────────────────────────────────────────────────────────────────────


def _measured(node: Any) -> ErrorNode | None:
    measures = _MEASURES.get(type(node).__name__)
    found = None if measures is None else measures(node)
    return found if found is not None and found.difference.dim() else None


def _by(node: Any, difference: Tensor, distance: Distance, factor: float = 1.0) -> ErrorNode:
    difference = difference.detach()
    losses = partial(distance.losses, difference)
    squared = isinstance(distance, Squared)
    return ErrorNode(node, difference, losses, lambda each: factor * distance(each), squared=squared)


def _between(node: Any) -> Tensor | None:
    prediction, target = saved(node, "self"), saved(node, "target")
    if prediction is None or target is None or prediction.shape != target.shape:
        return None
    difference: Tensor = prediction.detach() - target.detach()
    return difference


def _mse(node: Any) -> ErrorNode | None:
    difference = _between(node)
    return None if difference is None else _by(node, difference, Squared())


def _huber(node: Any) -> ErrorNode | None:
    delta, difference = saved(node, "delta"), _between(node)
    return None if difference is None or not delta else _by(node, difference, Huber(delta))


def _smooth_l1(node: Any) -> ErrorNode | None:
    beta, difference = saved(node, "beta"), _between(node)
    return None if difference is None or not beta else _by(node, difference, Huber(beta), 1 / beta)


def _power(node: Any) -> ErrorNode | None:
    squared = saved(node, "self") if saved(node, "exponent") == 2 else None
    return None if squared is None else _by(node, squared, Squared())


def _absolute(node: Any) -> ErrorNode | None:
    difference = saved(node, "self")
    return None if difference is None else _by(node, difference, Absolute())


def _pseudo_huber(node: Any) -> ErrorNode | None:
    """√(d² + c²) − c, with a c for each row or for all."""
    root = _only_input(node, "SqrtBackward0")
    power = _only_input(_only_input(root, "AddBackward0"), "PowBackward0")
    square, result = None if power is None else _power(power), saved(root, "result")
    if square is None or result is None or result.shape != square.difference.shape or not result.dim():
        return None
    losses = partial(_under_root, square.difference, result.detach())
    return ErrorNode(power, square.difference, losses)


def _only_input(node: Any, kind: str) -> Any:
    """The one node that another takes its input from besides constants, if it is of a kind."""
    found = [] if node is None else [each for each, _ in node.next_functions if each is not None]
    return found[0] if len(found) == 1 and type(found[0]).__name__ == kind else None


def _under_root(difference: Tensor, root: Tensor, gradient: Tensor) -> Tensor:
    """See :meth:`Distance.losses`. c is read where d is smallest, since elsewhere rounding hides it."""
    d, root = difference.flatten(1).float(), root.flatten(1).float()
    place = d.abs().argmin(1, keepdim=True)
    c = (root.gather(1, place).square() - d.gather(1, place).square()).clamp(min=0).sqrt()
    per_slope = d * root / (root + c).clamp(min=1e-30)  # (root − c) / (d / root), in which nothing cancels
    return (gradient.flatten(1).float() * per_slope).sum(1)


_MEASURES: dict[str, Callable[[Any], ErrorNode | None]] = {
    "MseLossBackward0": _mse,
    "PowBackward0": _power,
    "AbsBackward0": _absolute,
    "HuberLossBackward0": _huber,
    "SmoothL1LossBackward0": _smooth_l1,
    "SubBackward0": _pseudo_huber,
}
"""Kind of node → what it measures."""
