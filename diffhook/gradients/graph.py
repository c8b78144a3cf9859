"""What stands behind a tensor in autograd's graph."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor
from torch.autograd.graph import Node


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
