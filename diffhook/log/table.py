"""Reading one table: a column at a time, or whole shards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from diffhook.errors import LogError
from diffhook.log.schema import BY_NAME, COLUMNS, SCALARS

Array = npt.NDArray[Any]


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

    def __init__(self, name: str, groups: list[zarr.Group]) -> None:
        self.name = name
        self._groups = groups

    def __len__(self) -> int:
        return int(sum(mask.sum() for mask in self._valid))

    def __repr__(self) -> str:
        return f"<Table {self.name}: {len(self)} rows of {len(self._groups)} ranks>"

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns, in the order of the schema."""
        if not self._groups:
            return ()
        return tuple(c.name for c in COLUMNS if c.optional or c.name in self._stored)

    @cached_property
    def _stored(self) -> frozenset[str]:
        return frozenset.intersection(*(frozenset(group.array_keys()) for group in self._groups))

    @property
    def description(self) -> Any:
        """What the writer said of the rows once they were complete; None before."""
        return self._groups[0].attrs.asdict().get("description") if self._groups else None

    @property
    def dim(self) -> int:
        """D, the length of the projections; 0 where there are none."""
        if "projection" not in self.columns:
            return 0
        return int(self._array(0, "projection").shape[1])

    def __getitem__(self, column: str) -> Array:
        if column in SCALARS and column in self.columns:
            return self._scalars[column]
        parts = [self.read(block, column) for block in self.blocks()]
        if parts:
            return np.concatenate(parts)
        self._check(column)
        return np.empty((0, self.dim) if column == "projection" else 0, np.float32)

    def blocks(self) -> Iterator[Block]:
        """The table's shards, in order."""
        offset = 0
        for rank, valid in enumerate(self._valid):
            name = "projection" if "projection" in self.columns else "sample"
            array = self._array(rank, name)
            size = (array.shards or array.chunks)[0]
            for start in range(0, len(valid), size):
                stop = min(start + size, len(valid))
                yield Block(rank, start, stop, offset)
                offset += int(valid[start:stop].sum())

    def read(self, block: Block, column: str) -> Array:
        """The block's valid rows of one column."""
        self._check(column)
        valid = self._valid[block.rank][block.start : block.stop]
        if column not in self._stored:
            return np.full(int(valid.sum()), BY_NAME[column].fill, BY_NAME[column].dtype)
        values = np.asarray(self._array(block.rank, column)[block.start : block.stop])
        return values if valid.all() else values[valid]

    # ── internals ─────────────────────────────────────────────────────────────────────────────

    def _check(self, column: str) -> None:
        if self._groups and column not in self.columns:
            raise LogError(f"{self.name} has no column {column!r}; it has {', '.join(self.columns)}")

    def _array(self, rank: int, column: str) -> zarr.Array[Any]:
        array = self._groups[rank][column]
        if not isinstance(array, zarr.Array):
            raise LogError(f"{self.name}/{column} is not an array")
        return array

    @cached_property
    def _scalars(self) -> dict[str, Array]:
        found = {}
        for column in SCALARS:
            if column not in self._stored:
                if BY_NAME[column].optional:
                    found[column] = np.full(len(self), BY_NAME[column].fill, BY_NAME[column].dtype)
                continue
            parts = [
                np.asarray(self._array(rank, column)[: len(valid)])[valid]
                for rank, valid in enumerate(self._valid)
            ]
            found[column] = np.concatenate(parts)
        return found

    @cached_property
    def _valid(self) -> list[npt.NDArray[np.bool_]]:
        """Per rank: which rows are committed and not superseded by a later session."""
        return [self._valid_rows(rank) for rank in range(len(self._groups))]

    def _valid_rows(self, rank: int) -> npt.NDArray[np.bool_]:
        group = self._groups[rank]
        missing = {"sample", "step", "grad_norm"} - set(group.array_keys())
        if missing:
            raise LogError(f"{self.name}/{group.basename} lacks {', '.join(sorted(missing))}")
        # A process killed while appending leaves columns of unequal length.
        length = min(int(self._array(rank, name).shape[0]) for name in self._stored & {*BY_NAME})
        valid = np.asarray(self._array(rank, "sample")[:length]) >= 0
        sessions = group.attrs.asdict().get("sessions", [])
        assert isinstance(sessions, list)
        if len(sessions) > 1:
            step = np.asarray(self._array(rank, "step")[:length])
            for later in sessions[1:]:
                assert isinstance(later, dict)
                earlier = np.arange(length) < later["first_row"]
                valid &= ~(earlier & (step >= later["start_step"]))
        return valid
