"""What items and batches hold, value by value, so that a row of a batch can be compared with an item.

Arrays are compared by a few thousand of their numbers. Items are read before they are collated, since a
collation may sort, normalise or replace what it is given in place.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

SAMPLED = 4096  # numbers of an array that are compared
_LEAVES = 64  # of an item, and columns of a batch
_DEPTH = 4
_NO_NUMBERS = (torch.bool, torch.complex32, torch.complex64, torch.complex128)

Path = tuple[Hashable, ...]


@dataclass(frozen=True)
class Leaf:
    """One value of an item.

    Attributes:
        item: which item.
        path: the keys that lead to it.
        value: a string, number, array or other object.
        parts: how many values lie in the list that this one lies in, whose place in it ends the path; 1 where
            it lies in none.
        sample: of an array, up to :data:`SAMPLED` numbers as they were before collation.
    """

    item: int
    path: Path
    value: Any
    parts: int = 1
    sample: Tensor | None = None


@dataclass(frozen=True)
class BatchColumn:
    """What a batch holds of each row, under one key: a tensor, or a sequence of values."""

    key: Hashable
    rows: Tensor | Sequence[Any]

    def __len__(self) -> int:
        return len(self.rows)


def leaves(items: Sequence[Any]) -> list[Leaf]:
    """All values of the items; arrays as they are now."""
    found = []
    for number, item in enumerate(items):
        if item is None:
            continue
        for (path, value, parts), _ in zip(_walk(item, (), 1), range(_LEAVES), strict=False):
            array = as_array(value)
            if array is None:
                found.append(Leaf(number, path, value, parts))
            elif array.numel():
                found.append(Leaf(number, path, array, parts, sampled(array)))
    return found


def _walk(value: Any, path: Path, parts: int) -> Iterator[tuple[Path, Any, int]]:
    if path == () and not isinstance(value, Tensor | str | int | float):
        yield path, value, parts  # the item itself, for collations that keep it whole
    if path and (numbers := _nested_numbers(value)) is not None:
        value, children = numbers, None
    else:
        children = _children(value) if len(path) < _DEPTH else None
    if children is None:
        if path or isinstance(value, Tensor | str | int | float | np.ndarray):
            yield path, value, parts
        return
    # Several values of one kind, not fields of an item.
    listed = isinstance(value, list | tuple) and path != ()
    for key, child in children:
        if listed:
            yield (*path, key), child, parts * len(value)
        else:
            yield from _walk(child, (*path, key), parts)


def _children(value: Any) -> list[tuple[Hashable, Any]] | None:
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, list | tuple) and not _is_flat(value):
        return list(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return list(vars(value).items())
    return None


def fields(value: Any) -> list[tuple[Hashable, Any]]:
    """(key, value) of what a batch, or an item, holds directly; nothing where it is one value."""
    return _children(value) or []


def columns(batch: Any) -> list[BatchColumn]:
    """All that the batch may hold by row."""
    return [column for column, _ in zip(_columns(batch, None, 0), range(_LEAVES), strict=False)]


def _columns(value: Any, key: Hashable, depth: int) -> Iterator[BatchColumn]:
    if isinstance(value, Tensor | np.ndarray):
        array = as_array(value)
        if array is not None and array.dim():
            yield BatchColumn(key, array)
    elif isinstance(value, list | tuple) and value:
        yield BatchColumn(key, value)
        if depth < _DEPTH:
            yield from _columns_of_elements(value, key, depth)
    elif depth < _DEPTH:
        for name, child in _children(value) or ():
            yield from _columns(child, name, depth + 1)


def _columns_of_elements(values: Sequence[Any], key: Hashable, depth: int) -> Iterator[BatchColumn]:
    if all(isinstance(value, Mapping) for value in values):
        for name in values[0]:
            yield BatchColumn(name, [value.get(name) for value in values])
    elif not _is_flat(values):
        for position, child in enumerate(values):
            yield from _columns(child, position if depth == 0 else key, depth + 1)


def _is_flat(values: Sequence[Any]) -> bool:
    """Whether this is a list of numbers, such as tokens, which counts as an array."""
    return len(values) > 1 and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)


def _nested_numbers(value: Any) -> np.ndarray[Any, Any] | None:
    """Lists of lists of numbers, all of one length, such as latents of datasets that keep no arrays."""
    if not isinstance(value, list | tuple) or not value or not isinstance(value[0], list | tuple):
        return None
    first = value[0]
    while isinstance(first, list | tuple) and first:
        first = first[0]
    if not isinstance(first, int | float) or isinstance(first, bool):
        return None
    try:
        array = np.array(value)
    except (ValueError, OverflowError):
        return None  # of several lengths
    if array.dtype.kind not in "if" or array.size < 2:
        return None
    return array.astype(np.float32) if array.dtype.kind == "f" else array  # as torch.tensor makes of floats


def as_array(value: Any) -> Tensor | None:
    """An array of at least one axis as a tensor; None for anything else."""
    with suppress(Exception):  # arrays of strings and objects, images that are not loaded
        if isinstance(value, Tensor):
            return value.detach() if value.dim() and value.layout == torch.strided else None
        if isinstance(value, np.ndarray):
            return torch.from_numpy(np.ascontiguousarray(value)) if value.ndim else None
        if isinstance(value, list | tuple) and _is_flat(value):
            return torch.tensor(value)
        if (numbers := _nested_numbers(value)) is not None:
            return torch.from_numpy(numbers)
        if _is_loaded_image(value):
            return torch.from_numpy(np.asarray(value).copy())
    return None


def _is_loaded_image(value: Any) -> bool:
    """Whether this is a PIL image with its pixels in memory: loading could change what the loop does."""
    held = getattr(value, "__dict__", {})  # not attributes, which may load
    return hasattr(type(value), "__array_interface__") and held.get("_im", held.get("im")) is not None


def sampled(array: Tensor) -> Tensor:
    """(≤ SAMPLED,) numbers of an array, evenly spaced, on the CPU; a copy."""
    flat = array.reshape(-1)
    stride = -(-flat.numel() // SAMPLED)
    return flat[:: stride | 1].cpu().clone()  # an even stride would meet few columns of an image


def is_rich(sample: Tensor) -> bool:
    """Whether an array has enough in it that another one equals it by chance never."""
    return len(sample) >= 8 and int((sample[1:] != sample[:-1]).sum()) >= 4


def array_key(shape: torch.Size, sample: Tensor, dtype: torch.dtype) -> Hashable | None:
    """What arrays that are equal as ``dtype`` share; axes of length 1 do not count."""
    if sample.is_floating_point() and not dtype.is_floating_point:
        return None
    content = sample.to(dtype).contiguous().view(torch.uint8).numpy().tobytes()
    return tuple(length for length in shape if length != 1), content


def value_key(value: Any) -> Hashable | None:
    """What equal strings and numbers share, and the same object with itself; None for what tells nothing."""
    if value is None or isinstance(value, bool):
        return None
    if isinstance(value, str | bytes):
        return "text", value
    if isinstance(value, os.PathLike):
        return "text", os.fspath(value)
    number = _number(value)
    return ("object", id(value)) if number is None else ("number", float(np.float32(number)))


def _number(value: Any) -> float | None:
    if isinstance(value, Tensor):
        return float(value) if value.numel() == 1 and value.dtype not in _NO_NUMBERS else None
    if isinstance(value, np.ndarray | np.generic):
        return float(value.item()) if value.size == 1 and value.dtype.kind in "iuf" else None
    return float(value) if isinstance(value, int | float) else None


def is_telling(key: Hashable) -> bool:
    """Whether equality of this value means something under whatever key: not so a small number."""
    kind, held = cast("tuple[str, Any]", key)
    return bool(not float(held).is_integer() if kind == "number" else held)
