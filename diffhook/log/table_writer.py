"""Appending rows to one table, a whole shard at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from zarr.abc.store import Store

from diffhook.errors import LogError
from diffhook.log import store as files
from diffhook.log.columns import new_layout
from diffhook.log.encoding import put_chunk
from diffhook.log.lineage import Session
from diffhook.log.mark import mark_json, put_attributes
from diffhook.log.rank import RankGroup
from diffhook.log.schema import (
    BY_NAME,
    COLUMNS,
    Rows,
    json_like,
    rows_per_shard,
)

_AHEAD = 15  # shards by which arrays are extended in advance, so that their metadata is seldom rewritten
_TOGETHER = 4  # shards that one commit vouches for at most, while more are waiting


def empty_group(store: Store, path: str) -> None:
    """Take a group's rows away. What is left where that is cut short, or where a network's listing lacks some
    files, is a group without rows."""
    put_attributes(store, path, {})
    for key in list(files.keys(store, path)):
        if key != f"{path}/zarr.json":
            files.remove(store, key)


class TableWriter:
    """Appends rows to one rank's group of one table. Not thread-safe; one writer per group.

    Rows since the last shard boundary stay in memory, so that a shard begun is rewritten whole; so do
    shards that were not committed yet, up to four. Every method may be called again after it failed.

    Args:
        before_commit: called before rows count that did not.

    Raises:
        LogError: the group is damaged.
    """

    def __init__(
        self,
        store: Store,
        path: str,
        dim: int,
        dtype: str,
        before_commit: Callable[[], None] = lambda: None,
    ) -> None:
        self._store, self._path = store, path
        self._before_commit = before_commit
        files.clean(store, path)
        group = RankGroup(store, path)
        self.shard_rows = group.shard_rows if group.columns else rows_per_shard(dim, dtype)
        kept = group.columns if group.committed else BY_NAME.keys()  # an older log has fewer optional ones
        wanted = [c for c in COLUMNS if c.name in kept or not c.optional]
        names = [c.name for c in wanted if dim or c.name != "projection"]
        self._layouts = {name: new_layout(name, dim, dtype, self.shard_rows) for name in names}
        if group.columns:
            self._check(group)
        for name, layout in self._layouts.items():
            if name not in group.columns:
                self._set_length(name, 0)
            elif group.layout(name) != layout:
                raise LogError(f"{path}/{name} has another layout than this run would write")
        committed = group.committed
        self._attributes: dict[str, Any] = {
            "sessions": [],
            **group.attributes,
            "columns": names,
            "committed": committed,
        }
        self._boundary = committed // self.shard_rows * self.shard_rows
        self._tail: list[Rows] = []
        if committed > self._boundary:
            self._tail = [{name: group.read(name, self._boundary, committed) for name in names}]
        self._tail_rows = committed - self._boundary
        self._uncommitted: list[tuple[int, Rows]] = []  # what was written since: first row, rows
        self._failed_commits = files.failed_commits(store)  # when they were written
        self._length = committed  # of the arrays, at least
        self._marked = True  # the attributes on disk are ours
        self._marks = {files.get(store, f"{path}/zarr.json")}  # what they are, or may be after a failed write
        if not group.attributes:  # before the first chunk: chunks without a mark have lost it
            self._mark(self._attributes)

    def _check(self, group: RankGroup) -> None:
        missing = set(self._layouts) - group.columns
        if missing and group.committed:
            raise LogError(f"{self._path} lacks {', '.join(sorted(missing))}")

    def __len__(self) -> int:
        return self._boundary + self._tail_rows

    @property
    def uncommitted(self) -> int:
        """Rows that do not count yet."""
        return len(self) - int(self._attributes["committed"])

    def begin_session(self, sessions: Sequence[Session], processes: int = 1) -> None:
        """Rows from here on are of the last of these sessions, which are all that the log has.

        Those that this rank took no part in have no rows here. On the disk with the next :meth:`commit`.

        Args:
            processes: that take part in it.
        """
        known: list[dict[str, Any]] = self._attributes["sessions"]
        new = [{**asdict(session), "first_row": len(self)} for session in sessions[len(known) :]]
        if new:
            new[-1]["processes"] = processes
        self._attributes["sessions"] = [*known, *new]
        self._marked = self._marked and not new

    def describe(self, description: Mapping[str, Any]) -> None:
        """Keep a description of the rows beside them."""
        self._mark({**self._attributes, "description": json_like(description)})

    def note_snapshots(self, *steps: int) -> None:
        """Say at the next :meth:`commit` at which steps this session has written snapshots."""
        *before, session = self._attributes["sessions"]
        known = session.get("snapshots", [])
        new = sorted({*known, *steps})
        if new != known:
            self._attributes["sessions"] = [*before, {**session, "snapshots": new}]
            self._marked = False

    def note_dropped(self, **counts: int) -> None:
        """Say at the next :meth:`flush` how many steps, rows or snapshots of this session were left out
        so far."""
        *before, session = self._attributes["sessions"]
        session = {**session, **{f"dropped_{what}": count for what, count in counts.items()}}
        self._attributes["sessions"] = [*before, session]
        self._marked = False

    def append(self, rows: Rows) -> None:
        """Add rows. Whole shards are written, and count from the next commit on, which comes by itself
        after a few of them; the rest waits for more or for :meth:`flush`."""
        self._write_again()
        if len(self._uncommitted) >= _TOGETHER:
            self.commit()
        tail = [*self._tail, self._complete(rows)]
        waiting = self._tail_rows + len(rows["sample"])
        whole = waiting // self.shard_rows * self.shard_rows
        written: list[tuple[int, Rows]] = []
        if whole:
            joined = self._joined(tail)
            for start in range(0, whole, self.shard_rows):
                part = {name: v[start : start + self.shard_rows] for name, v in joined.items()}
                written.append((self._boundary + start, part))
                self._write(*written[-1])
            tail = [{name: v[whole:] for name, v in joined.items()}] if waiting > whole else []
        self._uncommitted += written
        self._tail, self._tail_rows = tail, waiting - whole
        self._boundary += whole

    def commit(self) -> None:
        """Make the shards count that were written."""
        if not self._uncommitted and self._marked:
            return
        self.check_ours()
        self._before_commit()
        self._write_again()
        self._mark({**self._attributes, "committed": self._written})
        self._uncommitted.clear()

    def flush(self) -> None:
        """Write what waits, as the beginning of a shard, and commit."""
        self._write_again()
        if self._length != len(self):
            self.check_ours()
            self._set_lengths(len(self))
            self._marked = False
        if self._tail_rows and len(self) > self._written:
            self._tail = [self._joined(self._tail)]
            self._write(self._boundary, self._tail[0])
            self._uncommitted.append((self._boundary, self._tail[0]))
        self.commit()

    @property
    def _written(self) -> int:
        """Rows that are in files, committed or not."""
        if not self._uncommitted:
            committed: int = self._attributes["committed"]
            return committed
        start, rows = self._uncommitted[-1]
        return start + len(rows["sample"])

    def _complete(self, rows: Rows) -> Rows:
        count = len(rows["sample"])
        optional = {c.name: c for c in COLUMNS if c.optional}
        left_out = [c for name, c in optional.items() if name not in rows]
        rows = {**rows, **{c.name: np.full(count, c.fill, c.dtype) for c in left_out}}
        rows = {name: v for name, v in rows.items() if name in self._layouts or name not in optional}
        if set(rows) != set(self._layouts):
            raise LogError(f"rows have columns {sorted(rows)}, the log {sorted(self._layouts)}")
        return rows

    def _joined(self, parts: list[Rows]) -> dict[str, Any]:
        if len(parts) == 1:
            return dict(parts[0])
        return {name: np.concatenate([part[name] for part in parts]) for name in self._layouts}

    def _write(self, start: int, rows: Rows) -> None:
        """Write one shard, or its beginning. Nothing of it counts before the mark is there."""
        self.check_ours()
        stop = start + len(rows["sample"])
        if stop > self._length:  # while shards come, some ahead: only the mark counts
            self._set_lengths(stop + _AHEAD * self.shard_rows)
        # The projection first: it is on its way to the disk while the others are written.
        for name in sorted(self._layouts, key=lambda name: name != "projection"):
            put_chunk(self._store, self._path, self._layouts[name], start, rows[name])

    def _write_again(self) -> None:
        """What a commit that failed, anyone's, may have lost."""
        failed = files.failed_commits(self._store)
        if failed != self._failed_commits:
            self._length = 0
            for start, rows in self._uncommitted:
                self._write(start, rows)
            self._failed_commits = failed

    def _set_lengths(self, length: int) -> None:
        for name in self._layouts:
            self._set_length(name, length)
        self._length = length

    def _set_length(self, name: str, length: int) -> None:
        content = json.dumps(self._layouts[name].metadata(length), indent=1).encode()
        files.set_uncommitted(self._store, f"{self._path}/{name}/zarr.json", content)

    def check_ours(self) -> None:
        """Nothing is written into what somebody has put in the place of the log, or where it was moved away.

        Raises:
            LogError: the group's mark is not the one that was written last.
        """
        mark = files.get(self._store, f"{self._path}/zarr.json")
        if mark not in self._marks:
            what = "has vanished" if mark is None else "was written by another run"
            raise LogError(f"{files.describe(self._store)}: {self._path} {what} while it was written")

    def _mark(self, attributes: dict[str, Any]) -> None:
        mark = mark_json(attributes)
        self._marks.add(mark)
        files.put(self._store, f"{self._path}/zarr.json", mark)
        self._marks = {mark}
        self._attributes = attributes
        self._marked = True
