"""One rank's group of one table: which of its rows count, and reading them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.abc.store import Store

from diffhook.errors import LogError
from diffhook.log import store as files
from diffhook.log.columns import Layout, check_frame, read_layout
from diffhook.log.schema import BY_NAME, REQUIRED
from diffhook.log.seal import parse, seal, unseal

Array = npt.NDArray[Any]
Ranges = list[tuple[int, int]]


class RankGroup:
    """The rows that one process appended to a table.

    Args:
        store: the log's.
        path: key of the group, such as "train/rank-0000".

    Raises:
        LogError: from any attribute or method: something is damaged; the message names the file.
    """

    def __init__(self, store: Store, path: str) -> None:
        self.store = store
        self.path = path

    @cached_property
    def keys(self) -> frozenset[str]:
        """Keys of all files. Listed after the attributes were read, so what is committed is there."""
        _ = self.attributes
        return frozenset(files.keys(self.store, self.path))

    @cached_property
    def attributes(self) -> dict[str, Any]:
        """What the writer says of its rows; {} of a group that was only begun."""
        place = f"{self.path}/zarr.json"
        content = files.get(self.store, place)
        if content is None:
            if any("/c/" in key for key in files.keys(self.store, self.path)):
                raise LogError(f"{place} is missing")
            return {}
        found = parse(content, place)
        attributes = found.get("attributes") if isinstance(found, dict) else None
        if not isinstance(attributes, dict) or found.get("node_type") != "group":
            raise LogError(f"{place} is damaged: no zarr group")
        fields = unseal(attributes, place, required="committed" in attributes)
        _check_attributes(fields, place)
        return fields

    @property
    def description(self) -> Any:
        return self.attributes.get("description")

    @property
    def sessions(self) -> list[dict[str, int]]:
        """Where each process start began: first_row, start_step, and what it had to drop."""
        found: list[dict[str, int]] = self.attributes.get("sessions", [])
        return found

    @property
    def lost(self) -> Ranges:
        """Row ranges that ``diffhook verify --repair`` has taken out."""
        return [(start, stop) for start, stop in self.attributes.get("lost", [])]

    @cached_property
    def _columns(self) -> dict[str, tuple[Layout, int, zarr.Array[Any]]]:
        present = [name for name in BY_NAME if f"{self.path}/{name}/zarr.json" in self.keys]
        if not self.attributes and "sample" not in present:
            return {}  # only begun: the last column is missing
        found = {name: read_layout(self.store, self.path, name) for name in present}
        missing = [name for name in self.attributes.get("columns", REQUIRED) if name not in found]
        if missing and self.attributes:
            raise LogError(f"{self.path} lacks {', '.join(missing)}")
        sizes = {layout.rows for layout, _, _ in found.values()}
        if len(sizes) > 1:
            raise LogError(f"{self.path} is damaged: columns in chunks of {sorted(sizes)} rows")
        if self.attributes and found["sample"][0].checksums and "committed" not in self.attributes:
            raise LogError(f"{self.path}/zarr.json is damaged: it does not say how many rows count")
        committed = self.attributes.get("committed", 0)
        for name, (_, length, _) in found.items():
            if length < committed:
                raise LogError(
                    f"{self.path}/{name}/zarr.json is damaged: {length} rows, but {committed} were written"
                )
        return found

    @property
    def columns(self) -> frozenset[str]:
        """Names of the columns that are stored."""
        return frozenset(self._columns)

    def layout(self, column: str) -> Layout:
        return self._columns[column][0]

    @property
    def shard_rows(self) -> int:
        """Rows of a shard."""
        return self.layout("sample").rows

    @property
    def dim(self) -> int:
        """D, the length of the projections; 0 where there are none."""
        return self.layout("projection").dim or 0 if "projection" in self._columns else 0

    @cached_property
    def committed(self) -> int:
        """Rows that were written whole."""
        if not self._columns:
            return 0
        if "committed" not in self.attributes:  # schema 1: the shortest column, as far as it is stored
            stored = max((i + 1 for i in self._stored_chunks("sample")), default=0)
            lengths = (length for _, length, _ in self._columns.values())
            return min(*lengths, stored * self.shard_rows)
        committed: int = self.attributes["committed"]
        chunks = -(-committed // self.shard_rows)
        if self.layout("sample").checksums and sum(1 for _ in self._stored_chunks("sample")) < chunks:
            raise LogError(f"{self.path}/sample is damaged: not all of its {chunks} chunks are there")
        return committed

    def _stored_chunks(self, column: str) -> Iterator[int]:
        prefix = f"{self.path}/{column}/c/"
        for key in self.keys:
            index = key.removeprefix(prefix).split("/")[0] if key.startswith(prefix) else ""
            if index.isdecimal() and len(index) < 16:
                yield int(index)

    @property
    def count(self) -> int:
        """Rows that count."""
        return int(self.shard_counts.sum())

    @cached_property
    def shard_counts(self) -> npt.NDArray[np.int64]:
        """(shards,): rows that count in each."""
        if self.all_count:
            return np.array([stop - start for start, stop in self._shards], np.int64)
        return np.array([self._valid_in(*shard).sum() for shard in self._shards], np.int64)

    def valid_in(self, start: int, stop: int) -> npt.NDArray[np.bool_]:
        """(stop − start,): which rows of [start, stop) are neither lost nor superseded by a later session.

        Reads their steps where a session begins, and nothing where all rows of a shard count, or none.
        """
        if self.all_count or start == stop:
            return np.ones(stop - start, np.bool_)
        first, last = start // self.shard_rows, -(-stop // self.shard_rows)
        rows = min(last * self.shard_rows, self.committed) - first * self.shard_rows
        counted = self.shard_counts[first:last].sum()
        if counted in (0, rows):
            return np.full(stop - start, counted > 0)
        return self._valid_in(start, stop)

    @property
    def all_count(self) -> bool:
        """Whether every row counts."""
        return not self.is_old and not self.lost and len(self.sessions) < 2

    @property
    def is_old(self) -> bool:
        """Whether it is of schema 1, which does not say how many rows count: :attr:`valid` is held then."""
        return "committed" not in self.attributes

    @cached_property
    def valid(self) -> npt.NDArray[np.bool_]:
        """(committed,): :meth:`valid_in` of all rows."""
        if self.is_old:
            known = self.read("sample", 0, self.committed) >= 0 if self.committed else np.ones(0, np.bool_)
            return self._unsuperseded(0, self.committed, known)
        return np.concatenate([np.ones(0, np.bool_), *(self.valid_in(*shard) for shard in self._shards)])

    @property
    def _shards(self) -> Iterator[tuple[int, int]]:
        if self.committed:
            for start in range(0, self.committed, self.shard_rows):
                yield start, min(start + self.shard_rows, self.committed)

    def _valid_in(self, start: int, stop: int) -> npt.NDArray[np.bool_]:
        if self.is_old:
            return self.valid[start:stop]
        return self._unsuperseded(start, stop, np.ones(stop - start, np.bool_))

    def _unsuperseded(self, start: int, stop: int, valid: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """``valid`` without rows [start, stop) that are lost or superseded."""
        for low, high in self.lost:
            valid[max(low - start, 0) : max(high - start, 0)] = False
        later = [(s["first_row"] - start, s["start_step"]) for s in self.sessions[1:]]
        if any(rows > 0 for rows, _ in later) and valid.any():
            step = self.read("step", start, stop, valid)
            for rows, start_step in later:
                if rows > 0:
                    valid[:rows] &= step[:rows] < start_step
        return valid

    def read(self, column: str, start: int, stop: int, among: Array | None = None) -> Array:
        """Rows [start, stop) of one column, counting or not.

        Args:
            among: (stop − start,) bool: chunks without a True are not read, and hold the fill value.
        """
        layout, _, array = self._columns[column]
        with self._naming(column, start, stop):
            if among is None or among.all():
                self._check_chunks(layout, start, stop)
                return np.asarray(array[start:stop])
            shape = (stop - start, *array.shape[1:])
            values = np.full(shape, BY_NAME[column].fill, layout.dtype)
            for first in range(start // layout.rows * layout.rows, stop, layout.rows):
                low, high = max(first, start), min(first + layout.rows, stop)
                if among[low - start : high - start].any():
                    self._check_chunks(layout, low, high)
                    values[low - start : high - start] = array[low:high]
            return values

    def column(self, name: str) -> Array:
        """One column of all rows that count."""
        return self.read(name, 0, self.committed, self.valid)[self.valid]

    def _check_chunks(self, layout: Layout, start: int, stop: int) -> None:
        for index in range(start // layout.rows, -(-stop // layout.rows)):
            key = layout.chunk_key(self.path, index)
            if key in self.keys:
                check_frame(self.store, layout, key)
            elif layout.checksums:
                raise LogError(f"{key} is missing")

    @contextmanager
    def _naming(self, column: str, start: int, stop: int) -> Iterator[None]:
        """Whatever a damaged chunk raises becomes an error that says where it lies."""
        try:
            yield
        except Exception as error:
            reason = "a checksum is wrong" if "checksum do not match" in str(error) else error
            raise LogError(f"{self.path}/{column}, rows {start} to {stop - 1}: {reason}") from error


def put_attributes(store: Store, path: str, attributes: dict[str, Any]) -> None:
    """Write a group's own zarr.json: the commit mark of its rows."""
    files.put(store, f"{path}/zarr.json", group_json(seal(attributes)))


def group_json(attributes: dict[str, Any]) -> bytes:
    return json.dumps({"zarr_format": 3, "node_type": "group", "attributes": attributes}, indent=1).encode()


def _check_attributes(fields: dict[str, Any], place: str) -> None:
    committed = fields.get("committed", 0)
    sound = (
        _is_count(committed)
        and _are(fields.get("columns", []), lambda name: isinstance(name, str))
        and _are(fields.get("sessions", []), _is_session)
        and _are(fields.get("lost", []), lambda r: _are(r, _is_count) and len(r) == 2 and r[0] <= r[1])
    )
    if not sound:
        raise LogError(f"{place} is damaged: its attributes make no sense")


def _are(found: Any, sound: Callable[[Any], bool]) -> bool:
    return isinstance(found, list) and all(sound(item) for item in found)


def _is_count(found: Any) -> bool:
    return type(found) is int and 0 <= found <= 1 << 48


def _is_session(found: Any) -> bool:
    counts = ("first_row", "dropped_steps", "dropped_rows", "dropped_snapshots")
    return (
        isinstance(found, dict)
        and all(_is_count(found.get(key, 0)) for key in counts)
        and type(found.get("start_step")) is int
        and abs(found["start_step"]) < 1 << 62
        and "first_row" in found
    )
