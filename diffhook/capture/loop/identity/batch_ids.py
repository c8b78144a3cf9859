"""Ids and names that a batch holds itself."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffhook.log.samples import ROLE_STRIDE, name_id

KEYS = (
    "sample_ids", "sample_id", "indices", "index", "idx", "ids", "id",
    "image_ids", "image_id", "item_ids", "item_id",
    "filenames", "filename", "file_names", "file_name",
    "filepaths", "filepath", "file_paths", "file_path", "paths", "path", "image_paths", "image_path",
    "image_files", "image_file", "files", "image_names", "image_name",
    "image_keys", "image_key", "item_keys", "item_key", "keys", "key", "uuids", "uuid",
    "uids", "uid", "__key__",
)  # fmt: skip
"""Keys under which batches are looked through for ids, the first that fits."""


def fields_of(batch: Any) -> Any:
    """A batch that is an object of the loop's own, as its attributes by name; any other as it is."""
    if isinstance(batch, Mapping | Sequence | Tensor) or not getattr(batch, "__dict__", None):
        return batch
    return vars(batch)


def shown_by(batch: Any) -> Any:
    """What a batch shows of its rows: of an object, its own tensors. What its items hold is no row."""
    fields = fields_of(batch)
    if fields is batch:
        return batch
    return {name: value for name, value in fields.items() if isinstance(value, Tensor)}


def candidates(batch: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What may be ids in a batch, with words for where: values under :data:`KEYS`, in their order; then what
    objects in a list call themselves by ("batch['items'][…].path"), if there is one such list."""
    for key in KEYS:
        if key in batch:
            yield f"batch[{key!r}]", batch[key]
    named = [(key, found) for key, values in batch.items() if (found := _called(values)) is not None]
    if len(named) == 1:
        key, (name, values) = named[0]
        yield f"batch[{key!r}][…].{name}", values


def _called(values: Any) -> tuple[str, list[str]] | None:
    """The attribute that names the objects of a list, and each one's."""
    if not isinstance(values, list | tuple) or not values or not all(hasattr(v, "__dict__") for v in values):
        return None
    for name in KEYS:
        found = [getattr(value, name, None) for value in values]
        texts = [os.fspath(own) for own in found if isinstance(own, str | os.PathLike)]
        if len(texts) == len(values) and all(texts):
            return name, texts
    return None


def leading(batch: Any) -> tuple[int, ...] | None:
    """The first axes of a batch's samples, at most two; None where no tensor tells."""
    values = batch.values() if isinstance(batch, Mapping) else batch
    if isinstance(values, Tensor):
        return tuple(values.shape[:2])
    if not isinstance(values, Sequence) and not isinstance(batch, Mapping):
        return None
    return next((tuple(v.shape[:2]) for v in values if isinstance(v, Tensor) and v.dim() > 1), None)


def as_ids(values: Any, lead: tuple[int, ...] | None = None) -> Tensor | None:
    """(B,) int64 of (B,) integers or B strings; None if ``values`` is anything else.

    Args:
        values: also nested, as where an item is a batch of its own.
        lead: the first axes of the samples, by which nested ones are put in order.
    """
    values = flat(values, lead)
    if values is None:
        return None
    if not isinstance(values, Tensor):
        if all(isinstance(value, str) for value in values):
            return torch.tensor([name_id(value) for value in values])
        values = torch.tensor(values)
    if values.is_floating_point() or values.dtype == torch.bool:
        return None
    ids = values.detach().cpu().long()
    return ids if bool(((ids >= 0) & (ids < ROLE_STRIDE)).all()) else None


def flat(values: Any, lead: tuple[int, ...] | None = None) -> Tensor | list[Any] | None:
    """(B,) integers or strings, in the order of the rows; None if these are none."""
    if hasattr(values, "tolist") and not isinstance(values, Tensor):
        values = values.tolist()  # numpy
    if isinstance(values, Tensor):
        if values.dim() == 2 and len(values) == 1 and tuple(values.shape) == lead:
            values = values[0]
        return values if values.dim() == 1 and len(values) else None
    if not isinstance(values, Sequence) or isinstance(values, str | bytes) or not values:
        return None
    if all(isinstance(value, list | tuple) and value for value in values):
        values = _joined(values, lead)
    plain = [os.fspath(value) if isinstance(value, os.PathLike) else value for value in values or ()]
    if plain and all(isinstance(value, str) for value in plain):
        return plain
    return [int(v) for v in plain] if plain and all(hasattr(v, "__index__") for v in plain) else None


def _joined(lists: Sequence[Sequence[Any]], lead: tuple[int, ...] | None) -> list[Any] | None:
    """Of lists in a list; of tuples as ``default_collate`` makes them, the k-th has the k-th of each item."""
    in_order = [value for values in lists for value in values]
    lengths = {len(values) for values in lists}
    if isinstance(lists[0], list) or len(lists) == 1 or lengths == {1}:
        return in_order
    if lead is None or len(lengths) > 1:
        return None
    shape = (len(lists), *lengths)
    if lead[0] == math.prod(shape) or (lead == shape and shape[0] != shape[1]):
        return in_order
    if lead == shape[::-1] and shape[0] != shape[1]:
        return [value for values in zip(*lists, strict=True) for value in values]
    return None


def describe(values: Any) -> str:
    """``values`` as messages write them."""
    if isinstance(values, Tensor):
        return f"a tensor of shape {tuple(values.shape)} and {values.dtype}"
    shown = repr(values)
    return shown if len(shown) < 60 else f"a {type(values).__name__} {shown[:50]}…"
