"""Functions that make a row of the result out of several rows, or out of one of several arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffhook.capture.loop.tracing.codes import Known, carried, fits, tensors_in, unknown

PRODUCTS = {
    **dict.fromkeys(("matmul", "mm", "mv", "bmm", "__matmul__", "linear", "embedding", "cdist"), 0),
    **dict.fromkeys(("__rmatmul__", "addmm", "addmv", "baddbmm"), 1),
}
"""The place of the argument whose rows they have: rows of a matrix on its right are mixed."""


def multiplied(name: str, args: Sequence[Any], result: Tensor, known: Known) -> Tensor | None:
    """Of one of :data:`PRODUCTS`."""
    place = PRODUCTS[name]
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    rows = args[place] if place < len(args) else None
    if not isinstance(rows, Tensor):
        return None
    for other in tensors:
        codes = None if other is rows else known(other)
        if codes is not None and codes.dim() > other.dim() - 1:  # along an axis that is summed over
            return None
    return carried(tensors, {}, result, known)


def summed(args: Sequence[Any], result: Tensor, known: Known) -> Tensor | None:
    """Of einsum: an argument's rows come back where its first axis is the first of the result."""
    equation = args[0].replace(" ", "") if isinstance(args[0], str) else ""
    tensors = [*tensors_in(args[1:])]
    inputs, arrow, output = equation.partition("->")
    terms = inputs.split(",")
    if not arrow or not output or len(terms) != len(tensors):
        return None
    if any(term[:1] != output[:1] for term, t in zip(terms, tensors, strict=True) if known(t) is not None):
        return None
    return carried(tensors, {}, result, known)


def transforms_rows(name: str, tensor: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a function of torch.fft works along the axis of rows; several axes are all, if not said."""
    at = 1 if name.endswith("shift") else 2
    axes = kwargs.get("dim", args[at] if len(args) > at else None)
    if axes is None:
        return name.endswith(("n", "shift"))
    return any(axis % tensor.dim() == 0 for axis in (axes if isinstance(axes, tuple | list) else (axes,)))


def chosen(args: Sequence[Any], result: Tensor, known: Known) -> Tensor | None:
    """Of where: rows that are wholly of one argument are that one's, also where nothing is known of it."""
    condition, *sources = args
    codes = [known(source) if isinstance(source, Tensor) else None for source in sources]
    lengths = [len(s) if isinstance(s, Tensor) and s.dim() == result.dim() else 0 for s in sources]
    if not result.dim() or not any(c is not None and c.dim() == 2 and fits(c, result) for c in codes):
        return carried(sources, {}, result, known)
    if codes[0] is codes[1] or max(lengths) == min(lengths) == 1 or len(result) not in lengths:
        return carried(sources, {}, result, known)
    rows = condition.expand(result.shape).reshape(len(result), -1)
    merged = carried(sources, {}, result, known)
    for source, own, whole, length in zip(sources, codes, (rows.all(1), ~rows.any(1)), lengths, strict=True):
        if length == len(result) and merged is not None and isinstance(source, Tensor):
            held = unknown(len(result)) if own is None else own
            merged = torch.where(whole.cpu()[:, None], held, merged)
    return merged
