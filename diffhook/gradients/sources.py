"""What the fallback knows of parameters on their way to the batch, and the way back."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from diffhook.errors import CaptureError
from diffhook.gradients.graph import Contexts

Pair = tuple["Source", Tensor | GradientEdge]  # a source, and the alias that stood in for it


@dataclass
class Source:
    """A parameter, or a tensor computed from one that has no sample axis in front.

    ``names`` are those of the parameters behind the tensor. What computed it had ``parents``, each
    with the alias that stood in for it, in ``dtype`` at the lowest, and ended in ``edge``; a parameter
    has none. A ``pure`` source has met nothing that could depend on the samples. ``order``: parents
    come before. ``contexts``: of what cannot be looked into, and has computed it.
    """

    tensor: Tensor
    names: frozenset[str]
    dtype: torch.dtype
    pure: bool = True
    parents: list[Pair] = field(default_factory=list)
    edge: GradientEdge | None = None
    order: int = 0
    contexts: Contexts | None = None


@dataclass
class Use:
    """One operation in which sources met the batch.

    ``output`` and ``edge`` close a cycle through the output's hook, which no garbage collector
    sees: both are cleared after use.
    """

    output: Tensor | None
    edge: GradientEdge | None
    sources: list[Pair]  # with the alias that stood in for it
    contexts: Contexts | None = None  # of what cannot be looked into, and has computed it


@dataclass
class Operation:
    """A call of a torch function that is about to run on sources, each replaced by an alias."""

    leaves: list[Tensor]
    pairs: list[Pair]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    on_alias: bool = False  # the first argument is one


def back_to_parameters(source: Source, share: Tensor) -> Iterable[tuple[str, Tensor]]:
    """The chain rule from a source to the parameters behind it.

    Through sources only, each once, whatever paths lead there: where samples came in along the way,
    that was a use of its own.
    """
    waiting = {id(source): (source, share)}
    while waiting:
        last = max(waiting, key=lambda key: waiting[key][0].order)
        source, share = waiting.pop(last)
        if source.edge is None:
            yield next(iter(source.names)), share
            continue
        aliases: list[Any] = [alias for _, alias in source.parents]
        with source.contexts or nullcontext():
            shares = torch.autograd.grad(source.edge, aliases, share, retain_graph=True, allow_unused=True)
        if all(part is None for part in shares):
            raise CaptureError("what it was computed from is no longer behind it")
        for (parent, _), part in zip(source.parents, shares, strict=True):
            if part is None:
                continue
            so_far = waiting.get(id(parent))
            waiting[id(parent)] = parent, part if so_far is None else so_far[1] + part
