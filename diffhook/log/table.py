"""Reading one table: a column at a time, or whole shards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from diffhook.errors import LogError
from diffhook.log.rank import RankGroup
from diffhook.log.schema import BY_NAME, SCALARS

Array = npt.NDArray[Any]

_KEPT_BYTES = 32 << 20  # of scalar columns, which every pass over the rows asks for anew


@dataclass(frozen=True)
class Block:
    """One shard's rows: positions [start, stop) of a rank's arrays, and which of them count."""

    rank: int
    start: int
    stop: int
    offset: int  # position of the block's first valid row among all valid rows of the table


class Table:
    """Committed rows of train/, probe/ or a query, all ranks one after the other.

    ``table["grad_norm"]`` reads a column over all rows, (rows,) or (rows, D); ``table.blocks()``
    and ``table.read(block, column)`` go through it shard by shard.
    """

    def __init__(self, name: str, groups: list[RankGroup]) -> None:
        self.name = name
        self.groups = [group for group in groups if group.columns]
        self._kept: dict[tuple[int, int, str], Array] = {}
        self._left = _KEPT_BYTES

    def __getstate__(self) -> dict[str, Any]:
        """Other processes read for themselves."""
        return {**self.__dict__, "_kept": {}, "_left": _KEPT_BYTES}

    def __len__(self) -> int:
        return sum(group.count for group in self.groups)

    def __repr__(self) -> str:
        return f"<Table {self.name}: {len(self)} rows of {len(self.groups)} ranks>"

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns, in the order of the schema."""
        if not self.groups:
            return ()
        return tuple(name for name, c in BY_NAME.items() if c.optional or name in self._stored)

    @cached_property
    def _stored(self) -> frozenset[str]:
        return frozenset.intersection(*(group.columns for group in self.groups))

    def dropped(self, what: str) -> int:
        """How many "steps", "rows" or "snapshots" all sessions had to leave out."""
        return sum(s.get(f"dropped_{what}", 0) for group in self.groups for s in group.sessions)

    @property
    def description(self) -> Any:
        """What the writer said of the rows once they were complete; None before."""
        return self.groups[0].description if self.groups else None

    @property
    def dim(self) -> int:
        """D, the length of the projections; 0 where there are none."""
        return self.groups[0].dim if self.groups else 0

    def __getitem__(self, column: str) -> Array:
        if column in SCALARS and column in self.columns:
            return self._scalar(column)
        parts = [self.read(block, column) for block in self.blocks()]
        if parts:
            return np.concatenate(parts)
        self._check(column)
        return np.empty((0, self.dim) if column == "projection" else 0, np.float32)

    def blocks(self) -> Iterator[Block]:
        """The table's shards, in order."""
        offset = 0
        for rank, group in enumerate(self.groups):
            for shard, count in enumerate(group.shard_counts.tolist()):
                start = shard * group.shard_rows
                yield Block(rank, start, min(start + group.shard_rows, group.committed), offset)
                offset += count

    def read(self, block: Block, column: str) -> Array:
        """The block's valid rows of one column; of a scalar not to be written to.

        Raises:
            LogError: no such column, or its rows are damaged.
        """
        self._check(column)
        key = block.rank, block.start, column
        if key in self._kept:
            return self._kept[key]
        values = self._read(block, column)
        if column != "projection" and values.nbytes <= self._left:
            values.flags.writeable = False
            self._kept[key] = values
            self._left -= values.nbytes
        return values

    # ── internals ─────────────────────────────────────────────────────────────────────────────

    def _read(self, block: Block, column: str) -> Array:
        group = self.groups[block.rank]
        valid = group.valid_in(block.start, block.stop)
        if column not in group.columns:
            return np.full(int(valid.sum()), BY_NAME[column].fill, BY_NAME[column].dtype)
        if not valid.any():
            return np.empty((0, group.dim) if column == "projection" else 0, group.layout(column).dtype)
        values = group.read(column, block.start, block.stop)
        return self._sound(column, group, values if valid.all() else values[valid])

    def _check(self, column: str) -> None:
        if self.groups and column not in self.columns:
            raise LogError(f"{self.name} has no column {column!r}; it has {', '.join(self.columns)}")

    def _sound(self, column: str, group: RankGroup, values: Array) -> Array:
        """A copy made while the log was written may have a mark that is newer than its rows."""
        if column == "sample" and (values < 0).any():
            raise LogError(f"{group.path}/sample is damaged: rows that were written have no sample id")
        return values

    @cached_property
    def _scalars(self) -> dict[str, Array]:
        return {}

    def _scalar(self, column: str) -> Array:
        if column not in self._scalars:
            parts = []
            for group in self.groups:
                if column in group.columns:
                    parts.append(self._sound(column, group, group.column(column)))
                else:
                    fill = BY_NAME[column].fill
                    parts.append(np.full(group.count, fill, BY_NAME[column].dtype))
            self._scalars[column] = np.concatenate(parts)
        return self._scalars[column]
