"""One rank's group of one table: which of its rows count, and reading them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.abc.store import Store

from diffhook.errors import LogError, LogUnavailableError
from diffhook.log import store as files
from diffhook.log.columns import ColumnLayout, read_layout
from diffhook.log.lineage import Path, Session, Span
from diffhook.log.mark import read_mark
from diffhook.log.schema import BY_NAME, REQUIRED

Array = npt.NDArray[Any]
Ranges = list[tuple[int, int]]

_CHUNKS_LOOKED_UP = 1000  # one by one, where a listing lacks them


class DamagedRowsError(LogError):
    """Rows cannot be read.

    Attributes:
        reason: why, without saying where.
    """

    def __init__(self, path: str, column: str, start: int, stop: int, reason: str) -> None:
        super().__init__(f"{path}/{column}, rows {start} to {stop - 1}: {reason}")
        self.reason = reason


@dataclass(frozen=True)
class _Part:
    """Rows [start, stop) are of one session; ``span`` is None where it is on another branch."""

    start: int
    stop: int
    span: Span | None


class RankGroup:
    """The rows that one process appended to a table.

    Args:
        store: the log's.
        path: key of the group, such as "train/rank-0000".
        lineage: gives the path of sessions whose rows count; None: those of all sessions do.

    Raises:
        LogError: from any attribute or method: something is damaged; the message names the file.
    """

    def __init__(self, store: Store, path: str, lineage: Callable[[], Path] | None = None) -> None:
        self.store = store
        self.path = path
        self._lineage = lineage
        self._of_probes = path.startswith("probe/")
        self._stored: dict[str, tuple[ColumnLayout, int]] = {}
        self._arrays: dict[str, zarr.Array[Any]] = {}
        self._masks: dict[int, npt.NDArray[np.bool_]] = {}  # first row of a shard → which of its rows count

    @cached_property
    def keys(self) -> frozenset[str]:
        """Keys of all files. Listed after the attributes were read, so what is committed is there."""
        _ = self.attributes
        return frozenset(files.keys(self.store, self.path))

    @cached_property
    def attributes(self) -> dict[str, Any]:
        """What the writer says of its rows; {} of a group that was only begun."""
        return read_mark(self.store, self.path)

    @property
    def description(self) -> Any:
        return self.attributes.get("description")

    @property
    def sessions(self) -> list[dict[str, Any]]:
        """What this rank knows of each session, by number: id, parent, start_step, its own first_row there,
        and what it had to drop."""
        found: list[dict[str, Any]] = self.attributes.get("sessions", [])
        return found

    @cached_property
    def history(self) -> tuple[Session, ...]:
        """The same sessions, without what is this rank's own."""
        return tuple(Session(s["id"], s["start_step"], s["parent"]) for s in self.sessions)

    @cached_property
    def lost(self) -> Ranges:
        """Row ranges that ``diffhook verify --repair`` has taken out, in order and apart."""
        ranges = np.array(self.attributes.get("lost", []), np.int64).reshape(-1, 2)
        ranges = ranges[ranges[:, 0] < ranges[:, 1]]
        ranges = ranges[np.argsort(ranges[:, 0])]
        if not len(ranges):
            return []
        until = np.maximum.accumulate(ranges[:, 1])
        begins = np.concatenate([[True], ranges[1:, 0] > until[:-1]])
        ends = np.concatenate([begins[1:], [True]])
        return list(zip(ranges[begins, 0].tolist(), until[ends].tolist(), strict=True))

    @cached_property
    def _columns(self) -> dict[str, tuple[ColumnLayout, int]]:
        if not self.attributes:
            return {}
        names = self.attributes["columns"]
        if not set(REQUIRED) <= set(names) <= set(BY_NAME):
            raise LogError(f"{self.path}/zarr.json is damaged: its columns are {', '.join(names)[:200]}")
        found = {name: self.stored(name) for name in BY_NAME if name in names}
        sizes = {layout.rows for layout, _ in found.values()}
        if len(sizes) > 1:
            raise LogError(f"{self.path} is damaged: columns in chunks of {sorted(sizes)} rows")
        return found

    def stored(self, column: str) -> tuple[ColumnLayout, int]:
        """Layout and length of one column, whether the mark names it or not."""
        if column not in self._stored:
            self._stored[column] = read_layout(self.store, self.path, column)
        return self._stored[column]

    @property
    def columns(self) -> frozenset[str]:
        """Names of the columns that are stored."""
        return frozenset(self._columns)

    def layout(self, column: str) -> ColumnLayout:
        return self._columns[column][0]

    @property
    def shard_rows(self) -> int:
        """Rows of a shard."""
        return self.layout("sample").rows

    @property
    def dim(self) -> int:
        """D, the length of the projections; 0 where there are none."""
        return self.layout("projection").dim or 0 if "projection" in self._columns else 0

    @property
    def marked(self) -> int:
        """Rows that the mark vouches for, whether their files are there or not."""
        committed: int = self.attributes.get("committed", 0)
        return committed

    @cached_property
    def committed(self) -> int:
        """Rows that were written whole, with all of their ids: a number alone claims no rows."""
        if not self._columns:
            return 0
        chunks = -(-self.marked // self.shard_rows)
        listed = set(self._listed_chunks("sample"))
        unseen = chunks - sum(1 for index in listed if index < chunks)
        layout = self.layout("sample")
        if unseen > _CHUNKS_LOOKED_UP or not all(
            files.exists(self.store, layout.chunk_key(self.path, index))
            for index in range(chunks if unseen else 0)
            if index not in listed
        ):
            raise LogError(f"{self.path}/sample is damaged: not all of its {chunks} chunks are there")
        return self.marked

    def _listed_chunks(self, column: str) -> Iterator[int]:
        prefix = f"{self.path}/{column}/c/"
        for key in self.keys:
            index = key.removeprefix(prefix).split("/")[0] if key.startswith(prefix) else ""
            if index.isdecimal() and len(index) < 16:
                yield int(index)

    # ── which rows count ──────────────────────────────────────────────────────────────────────

    @property
    def count(self) -> int:
        """Rows that count."""
        return int(self.shard_counts.sum())

    @cached_property
    def shard_counts(self) -> npt.NDArray[np.int64]:
        """(shards,): rows that count in each."""
        if self.all_count:
            return np.array([stop - start for start, stop in self._shards], np.int64)
        return np.array([self._shard_mask(*shard).sum() for shard in self._shards], np.int64)

    def valid_in(self, start: int, stop: int) -> npt.NDArray[np.bool_]:
        """(stop − start,): which rows of [start, stop) are neither lost nor of another branch.

        Reads their steps where a branch leaves, once, and nothing where all rows of a shard count, or none.
        """
        if self.all_count or start == stop:
            return np.ones(stop - start, np.bool_)
        first = start // self.shard_rows * self.shard_rows
        shards = range(first, min(stop, self.committed), self.shard_rows)
        masks = [self._shard_mask(low, min(low + self.shard_rows, self.committed)) for low in shards]
        return np.concatenate(masks)[start - first : stop - first]

    def _shard_mask(self, start: int, stop: int) -> npt.NDArray[np.bool_]:
        if start not in self._masks:
            mask = self._valid_in(start, stop)
            if mask.all() or not mask.any():  # as nearly everywhere: keeps no memory
                mask = np.broadcast_to(mask[0], mask.shape)
            self._masks[start] = mask
        return self._masks[start]

    @cached_property
    def all_count(self) -> bool:
        """Whether every row counts."""
        return not self.lost and all(
            part.span is not None and part.span.is_whole(probes=self._of_probes) for part in self._parts
        )

    @cached_property
    def valid(self) -> npt.NDArray[np.bool_]:
        """(committed,): :meth:`valid_in` of all rows."""
        return np.concatenate([np.ones(0, np.bool_), *(self.valid_in(*shard) for shard in self._shards)])

    @property
    def _shards(self) -> Iterator[tuple[int, int]]:
        if self.committed:
            for start in range(0, self.committed, self.shard_rows):
                yield start, min(start + self.shard_rows, self.committed)

    @cached_property
    def _parts(self) -> list[_Part]:
        """The sessions that have rows here, in order."""
        if self._lineage is None:
            return []
        spans = self._lineage()
        edges = [min(session["first_row"], self.committed) for session in self.sessions]
        return [
            _Part(start, stop, spans.get(number))
            for number, (start, stop) in enumerate(pairwise([*edges, self.committed]))
            if start < stop
        ]

    def _valid_in(self, start: int, stop: int) -> npt.NDArray[np.bool_]:
        valid = np.ones(stop - start, np.bool_)
        for low, high in _overlapping(self.lost, start, stop):
            valid[max(low - start, 0) : max(high - start, 0)] = False
        parts = self._parts
        for index in range(max(bisect_right(parts, start, key=lambda part: part.start) - 1, 0), len(parts)):
            part = parts[index]
            if part.start >= stop:
                break
            low, high = max(part.start, start), min(part.stop, stop)
            among = valid[low - start : high - start]
            if part.span is None:
                among[:] = False
            elif low < high and among.any() and not part.span.is_whole(probes=self._of_probes):
                steps = self.read("step", low, high, among)
                among &= part.span.rows(steps, probes=self._of_probes)
        return valid

    # ── reading ───────────────────────────────────────────────────────────────────────────────

    def read(self, column: str, start: int, stop: int, among: Array | None = None) -> Array:
        """Rows [start, stop) of one column, counting or not.

        Args:
            among: (stop − start,) bool: chunks without a True are not read, and hold the fill value.
        """
        layout, array = self.layout(column), self._array(column)
        with self._naming(column, start, stop):
            if among is None or among.all():
                return self._rows(layout, array, start, stop)
            shape = (stop - start, *array.shape[1:])
            values = np.full(shape, BY_NAME[column].fill, layout.dtype)
            for first in range(start // layout.rows * layout.rows, stop, layout.rows):
                low, high = max(first, start), min(first + layout.rows, stop)
                if among[low - start : high - start].any():
                    values[low - start : high - start] = self._rows(layout, array, low, high)
            return values

    def _rows(self, layout: ColumnLayout, array: zarr.Array[Any], start: int, stop: int) -> Array:
        self._check_chunks(layout, start, stop)
        values = np.asarray(array[start:stop])
        if files.is_folder(self.store):  # perhaps moved since it was listed: zarr then makes rows up
            self._check_chunks(layout, start, stop, listed=False)
        return values

    def _array(self, column: str) -> zarr.Array[Any]:
        if column not in self._arrays:
            layout, length = self._columns[column]
            # A copy made while the log was written may have a mark that is newer than the array's length.
            self._arrays[column] = layout.array(self.store, self.path, max(length, self.marked))
        return self._arrays[column]

    def column(self, name: str) -> Array:
        """One column of all rows that count."""
        return self.read(name, 0, self.committed, self.valid)[self.valid]

    def _check_chunks(self, layout: ColumnLayout, start: int, stop: int, *, listed: bool = True) -> None:
        for index in range(start // layout.rows, -(-stop // layout.rows)):
            key = layout.chunk_key(self.path, index)
            if not (listed and key in self.keys) and not files.exists(self.store, key):
                raise LogError(f"{key} is missing")

    @contextmanager
    def _naming(self, column: str, start: int, stop: int) -> Iterator[None]:
        """Whatever a damaged chunk raises becomes an error that says where it lies."""
        try:
            yield
        except (DamagedRowsError, LogUnavailableError):
            raise
        except OSError as error:
            if not files.is_folder(self.store):
                raise LogUnavailableError(f"cannot read {self.path}/{column}: {error}") from error
            raise DamagedRowsError(self.path, column, start, stop, str(error)) from error
        except Exception as error:
            raise DamagedRowsError(self.path, column, start, stop, str(error)) from error


def _overlapping(ranges: Ranges, start: int, stop: int) -> Ranges:
    first = max(bisect_right(ranges, start, key=lambda r: r[0]) - 1, 0)
    return ranges[first : bisect_right(ranges, stop, key=lambda r: r[0])]
