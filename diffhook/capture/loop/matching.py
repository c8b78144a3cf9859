"""Which rows of a batch a collation made of which item."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from diffhook.log.samples import MAX_ROLES

_COMPARED = 4096  # numbers of a row


def blocks_of(items: Any, batch: Any) -> int:
    """How many blocks of a row per item the batch has, such as 2 for prior preservation: B instance images,
    then their B class images. 1 where the rows are not seen to be the items' tensors in this order.

    Args:
        items: what was collated.
        batch: what came of it.
    """
    with suppress(Exception):  # anything can be in a batch, and collation is the loop's, not ours
        return _find_blocks(items, batch)
    return 1


def _find_blocks(items: Any, batch: Any) -> int:
    count = len(items) if isinstance(items, list) else 0
    for rows in _tensors(batch) if count else ():
        blocks, rest = divmod(len(rows), count)
        if rest or not 1 < blocks <= MAX_ROLES or not _stems(rows, items, list(range(count)) * blocks):
            continue
        # Equal rows, such as those of one caption, tell no order.
        if count == 1 or not _stems(rows, items, [row // blocks for row in range(len(rows))]):
            return blocks
    return 1


def _stems(rows: Tensor, items: list[Any], sources: list[int]) -> bool:
    """Whether every row is a tensor of the item that ``sources`` has for it."""
    return all(
        any(_same(row, tensor) for tensor in _tensors(items[source]))
        for row, source in zip(rows, sources, strict=True)
    )


def _tensors(value: Any) -> Iterator[Tensor]:
    values: Any = [value]
    if isinstance(value, Mapping):
        values = value.values()
    elif isinstance(value, Sequence) and not isinstance(value, str):
        values = value
    return (tensor for tensor in values if isinstance(tensor, Tensor) and tensor.dim() > 0)


def _same(row: Tensor, tensor: Tensor) -> bool:
    if row.shape != tensor.shape:
        return False
    stride = max(row.numel() // _COMPARED, 1)
    return torch.equal(row.flatten()[::stride], tensor.flatten()[::stride].to(row))
