"""What is known of the rows of tensors: codes, and what they are where rows stay in their places.

A row's code is a pair (sample id, place), where the place counts the rows of all batches that came; (−1, −1)
is a row of which nothing is known, or that is made of several. The codes of a tensor are int64 of shape
(…, 2): (2,) for a tensor that is one row, (B, 2) for one whose first axis holds rows, (A, B, 2) for two axes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Known = Callable[
    [Tensor], Tensor | None
]  # gives the codes of an argument; None: nothing is known of its rows

UNKNOWN = -1


def fits(codes: Tensor, tensor: Tensor) -> bool:
    """Whether a tensor's first axes are those of the codes."""
    lead = codes.dim() - 1
    return tensor.dim() >= lead and tensor.shape[:lead] == codes.shape[:-1]


def unknown(*lead: int) -> Tensor:
    """Codes of rows of which nothing is known."""
    return torch.full((*lead, 2), UNKNOWN)


def are_known(codes: Tensor) -> bool:
    """Whether every row is known."""
    return bool((codes[..., 1] != UNKNOWN).all())


def carried(args: Sequence[Any], kwargs: Mapping[str, Any], result: Tensor, known: Known) -> Tensor | None:
    """Of a function that leaves rows where they are; where arguments disagree on a row, it is unknown."""
    told = [(tensor, known(tensor)) for tensor in tensors_in((*args, *kwargs.values()))]
    found = [codes for _, codes in told if codes is not None]
    if not found:
        return None
    fitting = [codes for codes in found if codes.dim() > 1 and fits(codes, result)]
    if not fitting:
        axes = max(tensor.dim() for tensor, codes in told if codes is not None)
        if any(codes.dim() > 1 for codes in found) or not 0 < result.dim() <= axes:
            return None
        fitting = found
    merged: Tensor | None = None
    for codes in fitting:
        if merged is None or merged is codes:
            merged = codes
        elif merged.shape == codes.shape:
            merged = agreed(merged, codes)
    return merged


def tensors_in(values: Sequence[Any]) -> Iterator[Tensor]:
    """The tensors among arguments, and in lists among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from (inner for inner in value if isinstance(inner, Tensor))


def agreed(one: Tensor, other: Tensor) -> Tensor:
    if torch.equal(one, other):
        return one
    return torch.where((one == other).all(-1, keepdim=True), one, UNKNOWN)
