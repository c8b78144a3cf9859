"""Which row of a batch a collation made of which item, told by what is in them.

A collation may stack, pad, sort, shuffle, drop, refill and double what it is given. A row is believed to be
an item where some value of the item comes back in it, and where no other value says otherwise.
"""

from __future__ import annotations

import logging
import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from diffhook.capture.loop.identity.alteration import altered
from diffhook.capture.loop.identity.content import (
    BatchColumn,
    Leaf,
    Path,
    array_key,
    as_array,
    columns,
    fields,
    is_rich,
    is_telling,
    leaves,
    sampled,
    value_key,
)
from diffhook.gradients import Guard
from diffhook.log.samples import MAX_ROLES, ROLE_STRIDE

logger = logging.getLogger("diffhook")

Kind = Literal[
    "",
    "unordered",
    "contradiction",
    "ambiguous",
    "dropped",
    "ready-made-batch",
    "no-ids",
    "unprepared",
    "failed",
]
"""Why it is not shown which item made which row."""

_SURE = 16.0  # bits of evidence, from which on a collation is known to keep the order of equal items


@dataclass(frozen=True)
class RowMatch:
    """What is known of a batch's rows.

    Attributes:
        rows: (R,) int64, for each row its item's position + role · ROLE_STRIDE; None where it is not shown.
        kind: why not.
    """

    rows: Tensor | None
    kind: Kind = ""


@dataclass
class Order:
    """How surely a collation keeps the order of its items, among which equal ones tell nothing."""

    bits: float = 0.0
    broken: bool = False

    def note(self, rows: list[int]) -> None:
        """One batch more, of whose rows every one is known."""
        if any(later < earlier for earlier, later in pairwise(rows)):
            self.broken = True
        self.bits += math.lgamma(len(rows) + 1) / math.log(2)

    @property
    def kept(self) -> bool:
        """Whether it surely keeps it."""
        return self.bits >= _SURE and not self.broken


@dataclass
class _Found:
    """What one column of a batch tells: for each row the items it may be, with the path of the value."""

    column: BatchColumn
    options: list[set[tuple[int, Path]]]
    strong: bool  # equality by chance is out of the question
    alike: bool  # all rows are equal
    parts: bool = False  # rows are parts of an item's value

    @property
    def full(self) -> bool:
        return all(self.options)


class Items:
    """The items of one batch, read before they are collated.

    Args:
        items: anything; what is no list is no items.
        order: what earlier batches of the same collation have shown.
        labels: of each item; items of one label, such as one index of the dataset, need not be told apart.
    """

    def __init__(
        self, items: Any, order: Order | None = None, labels: Sequence[Hashable] | None = None
    ) -> None:
        self.count = len(items) if isinstance(items, list | tuple) else 0
        self._items = list(items) if self.count else []  # a collation may sort the list itself
        self._order = Order() if order is None else order
        labelled = labels is not None and len(labels) == self.count
        self._labels: Sequence[Hashable] = labels if labels is not None and labelled else range(self.count)
        self._leaves = guarded(leaves, self._items) or []
        self._arrays: dict[torch.dtype, dict[Hashable, list[Leaf]]] = {}
        self._values: dict[Hashable, list[Leaf]] = defaultdict(list)
        for leaf in self._leaves:
            key = None if leaf.sample is not None and len(leaf.sample) > 1 else value_key(leaf.value)
            if key is not None:
                self._values[key].append(leaf)

    def match(self, batch: Any) -> RowMatch:
        """Which item each row of ``batch`` is. Never raises: anything can be in a batch."""
        return guarded(self._match, batch) or RowMatch(None, "failed")

    def _match(self, batch: Any) -> RowMatch:
        if self._is_passed_on(batch):
            return RowMatch(None, "ready-made-batch")
        held = columns(batch)
        found = [self._look_up(column) for column in held]
        strong = [f for f in found if f.strong and f.full and not f.alike]
        if not strong:
            strong = [f for column in held if (f := self._transposed(column)) is not None and not f.alike]
        if not strong:
            strong = [f for column in held if (f := self._altered(column)) is not None and not f.alike]
            strong = [f for f in strong if f.full]
        if not strong:
            if self._is_ready_made(held):
                return RowMatch(None, "ready-made-batch")
            strong = [f for f in found if f.full and (not f.alike or len(f.options) == 1)]
        if not strong and self.count == 1 and self._has_one_row(held):
            return RowMatch(torch.zeros(1, dtype=torch.int64))
        if not strong:  # equal rows, which a collation that is known to keep the order may still tell apart
            strong = [f for f in found if f.full]
        if not strong:
            return RowMatch(None, self._why_not(held))
        main = max(strong, key=lambda f: _numbers(f.column))
        if self._is_ready_made(_joined(batch, more_than=len(main.options))):
            return RowMatch(None, "ready-made-batch")  # lists of one have hidden it
        return self._assign(main, [f for f in [*strong, *found] if len(f.options) == len(main.options)])

    # ── what a column tells ───────────────────────────────────────────────────────────────────

    def _look_up(self, column: BatchColumn, *, listed: bool = False) -> _Found:
        """By equality; with what lies alone in an item, or with what is ``listed`` there."""
        rows = column.rows
        arrays = [as_array(row) for row in rows]
        samples = [None if a is None or a.numel() < 2 else sampled(a) for a in arrays]
        options, keys, telling = [], [], False
        for row, array, sample in zip(rows, arrays, samples, strict=True):
            if array is not None and sample is not None:
                key, same = self._equal_arrays(array, sample)
                rich = is_rich(sample)
                if len(sample) < 4:
                    same = _under(column.key, same)
            else:
                key = value_key(row)
                same = [] if key is None else self._values.get(key, [])
                rich = key is not None and is_telling(key)
                if not rich:  # small numbers mean something under their own key only
                    same = _under(column.key, same)
            keys.append(key)
            telling = telling or rich
            options.append({(leaf.item, leaf.path) for leaf in same if (leaf.parts > 1) is listed})
        return _Found(column, options, telling, len(set(keys)) == 1 and len(keys) > 1)

    def _transposed(self, column: BatchColumn) -> _Found | None:
        """By equality with what lies at one place of a tuple in every item: torch's collation makes a list of
        batches of a batch of tuples. Rows of one item alone are a batch that was made before."""
        if len(column) != self.count:
            return None
        found = self._look_up(column, listed=True)
        items: defaultdict[Path, set[int]] = defaultdict(set)  # of each place
        for item, path in set[tuple[int, Path]]().union(*found.options):
            items[path].add(item)
        options = [{(i, path) for i, path in own if len(items[path]) == self.count} for own in found.options]
        return replace(found, options=options) if found.strong and all(options) else None

    def _equal_arrays(self, array: Tensor, sample: Tensor) -> tuple[Hashable, list[Leaf]]:
        key = array_key(array.shape, sample, array.dtype)
        same = self._by_dtype(array.dtype).get(key, [])
        if len(same) > 1 and array.numel() > len(sample):  # equal where it was sampled: compare all
            same = [leaf for leaf in same if _equal(leaf.value, array)]
        return key, same

    def _by_dtype(self, dtype: torch.dtype) -> dict[Hashable, list[Leaf]]:
        if dtype not in self._arrays:
            table = self._arrays[dtype] = defaultdict(list)
            for leaf in self._leaves:
                if leaf.sample is not None and len(leaf.sample) > 1:
                    key = array_key(leaf.value.shape, leaf.sample, dtype)
                    if key is not None:
                        table[key].append(leaf)
        return self._arrays[dtype]

    def _altered(self, column: BatchColumn) -> _Found | None:
        """By resemblance: padded, cut, scaled and shifted rows."""
        rows = [as_array(row) for row in column.rows]
        if any(row is None or row.numel() < 2 for row in rows):
            return None
        arrays = [leaf for leaf in self._leaves if leaf.sample is not None and leaf.parts == 1]
        same = altered([row for row in rows if row is not None], arrays)
        options = [{(leaf.item, leaf.path) for leaf in leaves_of} for leaves_of in same]
        return _Found(column, options, True, len(rows) > 1 and len(set(map(frozenset, options))) == 1)

    def _is_passed_on(self, batch: Any) -> bool:
        """Whether the batch is an item as it was: nothing was stacked, so the item has all of its rows.

        Also where that is one row: others of the dataset have more perhaps, and are put together anew.
        """
        if self.count != 1:
            return False
        if batch is self._items[0]:
            return True
        arrays = [(key, array) for key, value in fields(batch) if (array := as_array(value)) is not None]
        whole = {leaf.path: leaf.value.shape for leaf in self._leaves if leaf.sample is not None}
        found = [whole[key,] == array.shape for key, array in arrays if (key,) in whole and array.dim() > 1]
        return bool(found) and all(found)

    def _is_ready_made(self, held: list[BatchColumn]) -> bool:
        """Whether rows are parts of what one item holds."""
        if not held:
            return False
        parts = {
            key
            for leaf in self._leaves
            if leaf.sample is not None and leaf.value.dim() and len(leaf.value) > 1
            for part in leaf.value[:256]
            if (key := _key(part)) is not None
        } | {key for leaf in self._leaves if leaf.parts > 1 and (key := _key(leaf.value)) is not None}
        return any(len(c) > 1 and all(_key(row) in parts for row in c.rows) for c in held)

    def _has_one_row(self, held: list[BatchColumn]) -> bool:
        """A single item has no order, whatever the collation has made of it."""
        lengths = [len(column) for column in held if isinstance(column.rows, Tensor)]
        return bool(lengths) and set(lengths) == {1}

    def _why_not(self, held: list[BatchColumn]) -> Kind:
        lengths = [len(column) for column in sorted(held, key=_numbers, reverse=True)]
        return "dropped" if lengths and self.count and lengths[0] % self.count else "unordered"

    # ── what they tell together ───────────────────────────────────────────────────────────────

    def _assign(self, main: _Found, all_found: list[_Found]) -> RowMatch:
        roles, options = _roles(main)
        if max(roles, default=0) >= MAX_ROLES:
            return RowMatch(None, "unordered")
        for found in all_found:
            if found is main or found.alike or not found.strong:
                continue
            options = _narrowed(options, found)
            if not all(options):
                return RowMatch(None, "contradiction")
        for found in all_found:
            if not found.strong and not found.alike:
                options = [a or b for a, b in zip(_narrowed(options, found), options, strict=True)]
        items = self._settle(roles, options)
        if items is None:
            return RowMatch(None, "ambiguous")
        return RowMatch(
            torch.tensor([item + role * ROLE_STRIDE for item, role in zip(items, roles, strict=True)])
        )

    def _are_equal(self, items: set[int]) -> bool:
        """Whether the items hold the same in everything that can be compared."""
        if len({self._labels[item] for item in items}) == 1:
            return True
        held: dict[int, set[Hashable]] = {item: set() for item in items}
        for leaf in self._leaves:
            if leaf.item in held:
                held[leaf.item].add((leaf.path, _content(leaf)))
        return len(set(map(frozenset, held.values()))) == 1

    def _settle(self, roles: list[int], options: list[set[int]]) -> list[int] | None:
        """One item for each row. Equal items are told apart by the order, where the others show it."""
        sure = sum(len({self._labels[item] for item in own}) == 1 for own in options)
        trusted = self._order.kept or (sure >= 2 and all(map(self._are_equal, options)))
        items: list[int] = [min(own) for own in options]
        for role in range(max(roles, default=0) + 1):
            places = [row for row, own in enumerate(roles) if own == role]
            if sure == len(options):
                self._order.note([items[row] for row in places])
                continue
            rising = _rising([options[row] for row in places])
            if rising is None or self._order.broken or not trusted:
                return None
            for row, item in zip(places, rising, strict=True):
                items[row] = item
        return items


def _joined(batch: Any, more_than: int) -> list[BatchColumn]:
    """Arrays that a batch holds directly, and that have more rows than other columns have made out."""
    arrays = [(key, array) for key, value in fields(batch) if (array := as_array(value)) is not None]
    return [
        BatchColumn(key, array)
        for key, array in arrays
        if array.dim() > 1 and len(array) > more_than and is_rich(sampled(array[0]))
    ]


def _narrowed(options: list[set[int]], found: _Found) -> list[set[int]]:
    """What is left of the items that each row may be; where the column tells nothing of a row, all."""
    others = [{item for item, _ in own} for own in found.options]
    return [own & other if other else own for own, other in zip(options, others, strict=True)]


def _under(key: Hashable, leaves: list[Leaf]) -> list[Leaf]:
    return [leaf for leaf in leaves if leaf.path and leaf.path[-1] == key]


def _roles(found: _Found) -> tuple[list[int], list[set[int]]]:
    """The role of each row, by the path from which its value came, and the items that it may be."""
    remaining = dict(enumerate(found.options))
    role_of, items = [0] * len(remaining), [set[int]() for _ in remaining]
    paths: list[Path] = []
    while remaining:
        counts = Counter(path for own in remaining.values() for path in {path for _, path in own})
        best = max(counts, key=lambda path: (counts[path], path[-1:] == (found.column.key,)))
        covered = [row for row, own in remaining.items() if any(path == best for _, path in own)]
        for row in covered:
            role_of[row] = len(paths)
            items[row] = {item for item, path in remaining.pop(row) if path == best}
        paths.append(best)
    first = [role_of.index(role) for role in range(len(paths))]
    rank = {role: place for place, role in enumerate(sorted(range(len(paths)), key=first.__getitem__))}
    return [rank[role] for role in role_of], items


def _rising(options: list[set[int]]) -> list[int] | None:
    """The one rising choice of an item for each row; None if there are several or none."""
    earliest, latest = _greedy(options, 1), _greedy(options[::-1], -1)
    return earliest if earliest is not None and latest is not None and earliest == latest[::-1] else None


def _greedy(options: list[set[int]], sign: int) -> list[int] | None:
    chosen: list[int] = []
    for own in options:
        later = [item for item in own if not chosen or (item - chosen[-1]) * sign > 0]
        if not later:
            return None
        chosen.append(min(later) if sign > 0 else max(later))
    return chosen


def _key(value: Any) -> Hashable | None:
    array = as_array(value)
    if array is None or array.numel() < 2:
        key = value_key(value)
        return key if key is not None and is_telling(key) else None
    sample = sampled(array)
    return array_key(array.shape, sample, torch.float32 if array.is_floating_point() else torch.int64)


def _content(leaf: Leaf) -> Hashable:
    if leaf.sample is not None:
        return array_key(leaf.value.shape, leaf.sample, leaf.sample.dtype)
    key = value_key(leaf.value)
    return None if isinstance(key, tuple) and key[0] == "object" else key


def _equal(value: Tensor, row: Tensor) -> bool:
    return torch.equal(value.reshape(-1).to(row), row.reshape(-1))


def _numbers(column: BatchColumn) -> int:
    """Of a row; strings and objects count as one."""
    rows: Any = column.rows
    first = as_array(rows[0]) if len(rows) and isinstance(rows[0], Tensor) else None
    return 1 if first is None else first.numel()


class _Logging(Guard):
    def keep(self, error: Exception) -> None:
        logger.debug("matching rows with items: %r", error)


guarded = _Logging()
"""Calls a function, in a loader's worker perhaps; None after an error, which is ours and not the loop's."""
