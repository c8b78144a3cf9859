"""Arrays that a collation has padded, cut, converted or normalised: which item's each of them was."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffhook.capture.loop.identity.content import Leaf, Path, is_rich, sampled

_PAIRS = 65_536  # rows × items that are compared one by one
_SAME = 1e-4  # 1 − correlation of a picture with itself after scaling, shifting and rounding to bfloat16
_PLACES = 1024  # of each channel


def altered(rows: Sequence[Tensor], leaves: Sequence[Leaf]) -> list[list[Leaf]]:
    """For each row the values that it was made of; nothing for those that are not recognised.

    Args:
        rows: arrays of two numbers and more.
        leaves: arrays of items.
    """
    paths: dict[Path, list[Leaf]] = defaultdict(list)
    for leaf in leaves:
        if len(rows) * len(leaves) <= _PAIRS and _is_what_it_was(leaf):
            paths[leaf.path].append(leaf)
    found: list[list[Leaf]] = [[] for _ in rows]
    for own in paths.values():
        best: list[list[Leaf]] = [[] for _ in rows]
        for way in (_padded(0), _padded(-1), _scaled):
            best = max(best, way(rows, own), key=lambda matches: sum(map(bool, matches)))
            if all(best):
                break
        found = [[*before, *more] for before, more in zip(found, best, strict=True)]
    return found


def _is_what_it_was(leaf: Leaf) -> bool:
    """Whether the collation has left the array alone, but for scaling it in place."""
    assert leaf.sample is not None
    now = sampled(leaf.value)
    if torch.equal(now, leaf.sample):
        return True
    before, after = (_standardised(s[None]) for s in (leaf.sample, now))
    return before.shape == after.shape and float(1 - before @ after) <= _SAME


def _padded(end: int) -> Callable[[Sequence[Tensor], list[Leaf]], list[list[Leaf]]]:
    """Compares what row and item have in common when laid together at the beginning (0) or the end (-1)."""

    def compare(rows: Sequence[Tensor], leaves: list[Leaf]) -> list[list[Leaf]]:
        return [[leaf for leaf in leaves if _overlap(row, leaf.value, end)] for row in rows]

    return compare


def _overlap(row: Tensor, value: Tensor, end: int) -> bool:
    if row.dim() != value.dim() or (value.is_floating_point() and not row.is_floating_point()):
        return False
    common = [min(pair) for pair in zip(row.shape, value.shape, strict=True)]
    if 0 in common:
        return False
    cut = tuple(slice(-length, None) if end else slice(length) for length in common)
    kept, given = row[cut], value[cut].to(row)
    first = (0,) * (row.dim() - 1)
    if not torch.equal(kept[first], given[first]) or not torch.equal(kept, given):
        return False
    filled = row.numel() - kept.numel()
    if list(value.shape) != common or not filled:  # cut, or of the same shape: enough must be left to tell
        return list(row.shape) == common and (value.shape == row.shape or is_rich(sampled(kept)))
    rest = torch.ones(row.shape, dtype=torch.bool)
    rest[cut] = False
    return len(row.cpu()[rest].unique()) == 1


def _scaled(rows: Sequence[Tensor], leaves: list[Leaf]) -> list[list[Leaf]]:
    """Compares by correlation, within each channel of an image."""
    shape = rows[0].shape
    fitting = [(leaf, laid) for leaf in leaves if (laid := _laid(leaf.value, shape)) is not None]
    if any(row.shape != shape for row in rows) or not fitting or rows[0].numel() < 16:
        return [[] for _ in rows]
    items = torch.stack([_standardised(_channels(laid)) for _, laid in fitting])
    found = []
    for row in rows:
        distance = 1 - items @ _standardised(_channels(row))
        best = float(distance.min())
        near = (distance <= 10 * max(best, 0) + 1e-9) & (distance <= _SAME)
        found.append([leaf for (leaf, _), close in zip(fitting, near.tolist(), strict=True) if close])
    return found


def _laid(value: Tensor, shape: torch.Size) -> Tensor | None:
    """An item's array in the form of a row: (H, W) or (H, W, C) as (C, H, W)."""
    if value.dim() == 3 and value.shape != shape and value.shape[-1] in (1, 3, 4):
        value = value.permute(2, 0, 1)
    if value.dim() == len(shape) - 1:
        value = value[None]
    return value if value.shape == shape else None


def _channels(array: Tensor) -> Tensor:
    """(C, ≤ _PLACES) numbers; C = 1 unless the first axis looks like channels."""
    channels = array.shape[0] if array.dim() > 2 and array.shape[0] <= 4 else 1
    flat = array.reshape(channels, -1)
    return flat[:, :: -(-flat.shape[1] // _PLACES) | 1].cpu()


def _standardised(channels: Tensor) -> Tensor:
    """(C · n,) float64 of unit length, each channel with mean 0 and equal length; zeros where constant."""
    values = channels.double()
    values = values - values.mean(1, keepdim=True)
    lengths = values.norm(dim=1, keepdim=True)
    values = torch.where(lengths > 1e-12, values / lengths.clamp(min=1e-12), 0.0).flatten()
    return values / values.norm().clamp(min=1e-12)
