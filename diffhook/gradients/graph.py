"""What stands behind a tensor in autograd's graph."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import Tensor
from torch.autograd.graph import Node

from diffhook.compat.torch import is_custom


def leaves_behind(node: Node, known: Collection[Node]) -> list[Tensor]:
    """Leaf tensors that need a gradient and are reached from ``node`` without passing a ``known`` node."""
    found: list[Tensor] = []
    waiting, seen = [node], {node}
    while waiting:
        node = waiting.pop()
        if node.name().endswith("AccumulateGrad"):
            found.append(node.variable)  # type: ignore[attr-defined]
            continue
        for after, _ in node.next_functions:
            if after is not None and after not in seen and after not in known:
                seen.add(after)
                waiting.append(after)
    return found


class Contexts:
    """What custom autograd functions behind some tensors keep in their ``ctx``, which is put back on leaving.

    After a backward of ours through them the loop's own is still to come, and many let go of their inputs in
    it, such as checkpoints of a repository's own.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._kept = [(node, dict(vars(node))) for node in _behind(tensors) if is_custom(node)]

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        for node, attributes in self._kept:
            vars(node).clear()
            vars(node).update(attributes)


def _behind(starts: Iterable[Tensor]) -> set[Node]:
    """All nodes of the graph behind some tensors."""
    waiting = [tensor.grad_fn for tensor in starts if tensor.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        for after, _ in waiting.pop().next_functions:
            if after is not None and after not in seen:
                seen.add(after)
                waiting.append(after)
    return seen
