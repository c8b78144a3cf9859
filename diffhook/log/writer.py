"""Writing a log: whatever a run hands over goes to a background thread, and from there to the store."""

from __future__ import annotations

import json
import logging
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from diffhook.errors import LogError, LogUnavailableError
from diffhook.log import alerts, opening
from diffhook.log import store as files
from diffhook.log.backlog import Backlog
from diffhook.log.content import Content
from diffhook.log.index import LogIndex
from diffhook.log.lineage import Session, continued, is_known
from diffhook.log.lock import lock_rank, release_rank
from diffhook.log.reader import RunLog
from diffhook.log.root import write_root
from diffhook.log.samples import NameWriter
from diffhook.log.schema import COLUMNS, SCALARS, Rows, projection_dtype
from diffhook.log.snapshot_writer import SnapshotWriter
from diffhook.log.snapshots import Snapshot
from diffhook.log.store import Location
from diffhook.log.table_writer import TableWriter
from diffhook.log.thumbnails import ThumbnailWriter, check_png

logger = logging.getLogger("diffhook")

_COPIED = 32 << 20  # bytes of a snapshot that are copied, so that training need not wait for the disk
_LONGEST = 60.0  # seconds that rows wait for a full shard, which may take hours, while others come
_OPENING = 5.0  # seconds that the loop waits for a store to be opened; it then goes on without


class LogWriter:
    """One process's end of a log.

    A session begins with the first row, snapshot or alert, not before: to open a log changes nothing in it.

    Args:
        location: folder, URL or Store; created where there is nothing. One that is away is waited for in
            the background: what comes meanwhile waits in ``memory``.
        config: the run's configuration; its part "identity" must equal the log's.
        rank, processes: this process's number, and how many there are.
        start_step: the optimiser step at which this process starts.
        after: id of the session that the checkpoint stands for from which training goes on; None: at
            ``start_step`` of the newest one.
        run: drawn at random, the same for all processes of this start of the run; None where they cannot
            talk to each other.
        memory: bytes of rows that may wait for the disk, besides up to five shards of each table.
        patience: seconds that :meth:`put` waits for room there, once, until half of it is written.
        strict: the first write that fails is not tried again: the next call raises.

    Raises:
        LogError: something else is there, or a log of another configuration or dataset; or another process
            is writing this rank (in folders; object stores are not guarded).
    """

    def __init__(
        self,
        location: Location,
        config: Mapping[str, Any],
        *,
        rank: int = 0,
        processes: int | None = None,
        start_step: int = 0,
        after: str | None = None,
        run: str | None = None,
        memory: int = 256 << 20,
        patience: float = 1.0,
        strict: bool = False,
    ) -> None:
        self.store = files.open_store(location, read_only=False)
        self.rank = rank
        self._location = location
        self._config, self._processes = config, processes
        self._start_step, self._after, self._run = start_step, after, run
        projection = config["identity"]["projection"]
        self._dim = int(projection["dim"])
        self._dtype = projection_dtype(projection["kind"])
        self._sessions: Sequence[Session] | None = None  # of the log, ours the last one; once it is open
        self._tables: dict[str, TableWriter] = {}
        self._closed = False
        self._alerts: list[str] | None = None
        self._alerts_key = alerts.key(rank)
        self._alerts_waiting = False
        self._thumbnails: ThumbnailWriter | None = None
        self._names = NameWriter(self.store, rank)
        self._flushed = time.monotonic()
        self._handed_over = self._appended = 0  # rows, by the training and by the thread
        self._dropped: dict[str, tuple[int, int]] = {}
        self.dropped_snapshots = 0
        self._backlog = Backlog(
            files.describe(self.store),
            memory=memory,
            patience=patience,
            network=not files.is_folder(self.store),
            strict=strict,
            ended=partial(_release, weakref.ref(self)),
        )
        self._backlog.begin(self._open, _OPENING)

    # ── where it stands ───────────────────────────────────────────────────────────────────────

    @property
    def session(self) -> int:
        """Number of this start of the run: its rows are, or will be, the log's rows of that session.
        −1 while a log is waited for that is away."""
        return -1 if self._sessions is None else len(self._sessions) - 1

    def position(self) -> str | None:
        """Id of the session that a checkpoint which is written now stands for: ours, or, where it has left
        nothing in the log, the one that we go on from. None: of no session."""
        if self._sessions is None:
            return self._after
        own = self._sessions[-1]
        if self._tables:
            return own.id
        return None if own.parent is None else self._sessions[own.parent].id

    def past(self) -> RunLog:
        """The log as this run goes on from it: what was before its own first row, and its own rows.

        Raises:
            LogError: it cannot be read, or not yet.
        """
        if self._sessions is None:
            raise LogUnavailableError(f"{files.describe(self.store)} is not available yet")
        store = files.open_store(self._location, read_only=True)  # not what waits to be published
        return RunLog(store, self._location, sessions=self._sessions)

    def will_supersede(self) -> str:
        """What this run will do to the rows that are there, as a sentence; "" where there are none, or where
        they cannot be read."""
        if self._sessions:
            *before, own = self._sessions
            with suppress(LogError, OSError):
                return opening.superseding(self.store, before, own)
        return ""

    @property
    def rows_in_memory(self) -> int:
        """Rows handed over that do not count yet."""
        return self._handed_over - self._appended + sum(t.uncommitted for t in list(self._tables.values()))

    @property
    def bytes_per_row(self) -> int:
        scalars = sum(np.dtype(c.dtype).itemsize for c in COLUMNS if c.name in SCALARS)
        return scalars + self._dim * np.dtype(self._dtype).itemsize

    @property
    def failing(self) -> bool:
        """The store refused the last attempt, or a wait for it was given up, and nothing was written
        since; the user was told, and it is tried again."""
        return self._backlog.failing or self._backlog.stalled

    @property
    def dropped_steps(self) -> int:
        """Steps whose rows were left out because the disk could not take them in time."""
        return self._dropped.get("train", (0, 0))[0]

    @property
    def dropped_rows(self) -> int:
        """Rows of all tables that were left out."""
        return sum(rows for _, rows in self._dropped.values())

    # ── called by the training process ────────────────────────────────────────────────────────

    def put(self, table: str, rows: Rows) -> bool:
        """Hand over the rows of one step, whole. Waits ``patience`` seconds at most.

        Returns:
            False: the disk is too far behind, and the rows are left out; the log says how many were.

        Raises:
            LogError: writing failed for good.
        """
        size = sum(column.nbytes for column in rows.values())
        if self._backlog.offer(lambda: self._append(table, rows), size):
            self._handed_over += len(rows["sample"])
            self._submit(self._catch_up)
            return True
        steps, count = self._dropped.get(table, (0, 0))
        if not self._dropped and not self._backlog.failing:
            where = files.describe(self.store)
            logger.warning("diffhook leaves out steps: %s cannot take rows as fast as they come", where)
        self._dropped[table] = (steps + 1, count + len(rows["sample"]))
        return False

    def snapshot(
        self,
        snapshot: Snapshot,
        parameters: bytes | Content | None,
        preconditioner: bytes | Content | None = None,
    ) -> bool:
        """Write a snapshot after all rows handed over before it; if memory does not hold both, this blocks
        until the rows are on disk. Content that may change is copied if it is below 32 MiB or goes over a
        network; larger content is written before this returns, so the snapshot is consistent without a copy.
        A snapshot that refers to a checkpoint has no ``parameters`` of its own.

        Returns:
            False: the disk fails or hangs, and the snapshot is left out; the log says how many were.

        Raises:
            LogError: writing failed for good.
        """
        self._submit(self._flush_tables)
        writing = SnapshotWriter(parameters, preconditioner)
        if writing.size <= _COPIED or not files.is_folder(self.store):
            writing.copy()
        job = partial(self._write_snapshot, snapshot, writing)
        if writing.settled:
            taken = self._backlog.offer_patiently(job, writing.size)
        else:
            taken = self._backlog.finish(job) or not writing.withdraw()
        if not taken:
            self.dropped_snapshots += 1
            logger.warning(
                "diffhook leaves out the snapshot of step %d: %s cannot take it, %s",
                snapshot.step, files.describe(self.store), self._backlog.trouble,
            )  # fmt: skip
        return taken

    def alert(self, alert: Mapping[str, Any]) -> None:
        """Add one alert to this rank's alerts. Always taken, however far behind the disk is: they are few."""
        self._submit(partial(self._add_alert, dict(alert)))
        self._submit(self._catch_up)

    def thumbnail(self, sample_id: int, png: bytes) -> bool:
        """Keep a small image of a sample. Nobody calls this unless asked to.

        Returns:
            False: the disk is too far behind, and it is left out.

        Raises:
            LogError: no PNG, or one of more than 1 MiB.
        """
        check_png(png)
        return self._submit(lambda: self._add_thumbnail(int(sample_id), png), len(png))

    def keep_names(self, names: dict[int, str]) -> None:
        """Keep the names of samples, on the disk before rows of theirs count.

        Args:
            names: id → name; gets what the log has already, and may grow until :meth:`close`.
        """
        with suppress(OSError):
            if self._sessions is not None:
                return self._names.keep(names)
        self._submit(lambda: self._names.keep(names))  # once the store is there

    def record(self, key: str, value: Mapping[str, Any]) -> None:
        """Write a JSON file about the run, such as its measured overhead, beside the tables."""
        content = json.dumps(value, indent=1).encode()
        self._submit(lambda: files.put(self.store, key, content))  # always taken: they are few and small

    def flush(self, timeout: float = 60.0) -> None:
        """Wait until everything handed over is on disk, ``timeout`` seconds at most; 0: it gets there soon.

        Raises:
            LogError: it could not be written in that time.
        """
        self._submit(self._flush_tables)
        if timeout:
            self._backlog.drain(timeout)

    def close(self, timeout: float = 60.0) -> None:
        """Flush and stop the thread. Idempotent.

        Args:
            timeout: seconds without progress after which the rest is given up; where a disk fails 5 at
                most, and where a network does after five attempts in vain. What works is waited for, however
                slow it is.

        Raises:
            LogError: not everything could be written.
        """
        if self._closed:
            return
        self._closed = True
        try:
            self._submit(self._add_end)
            self._submit(self._flush_tables)
        finally:
            self._backlog.close(timeout)

    # ── the writer's thread ───────────────────────────────────────────────────────────────────

    def _submit(self, job: Callable[[], None], size: int = 0) -> bool:
        return self._backlog.offer(job, size)

    def _catch_up(self) -> None:
        """Make count what was written, where nothing else waits for the disk."""
        if time.monotonic() - self._flushed > _LONGEST:
            self._flush_tables()
        elif self._backlog.idle:
            for table in self._tables.values():
                table.commit()
            self._write_alerts()

    def _flush_tables(self) -> None:
        self._flushed = time.monotonic()
        for name, table in self._tables.items():
            table.check_ours()
            if name in self._dropped:
                steps, rows = self._dropped[name]
                table.note_dropped(steps=steps, rows=rows)
            if name == "train" and self.dropped_snapshots:
                table.note_dropped(snapshots=self.dropped_snapshots)
            table.flush()
        if self._thumbnails is not None:
            self._thumbnails.flush()
        self._names.flush()
        self._write_alerts()

    def _append(self, table: str, rows: Rows) -> None:
        self._table(table).append(rows)
        self._appended += len(rows["sample"])

    def _table(self, name: str) -> TableWriter:
        if name not in self._tables:
            path = f"{name}/rank-{self.rank:04d}"
            table = TableWriter(self.store, path, self._dim, self._dtype, self._names.flush)
            assert self._sessions is not None
            table.begin_session(self._sessions, self._processes or self.rank + 1)
            self._tables[name] = table
        return self._tables[name]

    def _begin(self) -> None:
        """From now on this session is in the log, if it has no row yet."""
        self._table("train").commit()
        self._table("train").check_ours()

    def _write_snapshot(self, snapshot: Snapshot, writing: SnapshotWriter) -> None:
        self._begin()
        own = replace(snapshot, session=self.session, folder="")
        if writing.write(self.store, own):
            self._table("train").note_snapshots(own.step)
            self._table("train").commit()

    def _add_thumbnail(self, sample_id: int, png: bytes) -> None:
        if self._thumbnails is None:
            self._thumbnails = ThumbnailWriter(self.store, self.rank)
        self._thumbnails.add(sample_id, png)

    def _add_alert(self, alert: Mapping[str, Any]) -> None:
        self._begin()
        self._add_line(alerts.to_line({**alert, "session": self.session}))

    def _add_end(self) -> None:
        """Where this session has left nothing, the one before has ended too: it has no other writer."""
        self._add_line(alerts.end_line(self.session if self._tables else max(self.session - 1, 0)))

    def _add_line(self, line: str) -> None:
        if self._alerts is None:
            self._alerts = (files.get(self.store, self._alerts_key) or b"").decode().splitlines()
        self._alerts.append(line)
        self._alerts_waiting = True

    def _write_alerts(self) -> None:
        """The whole file anew: an object store knows no appending. So not after every alert."""
        if self._alerts_waiting and self._alerts:
            files.put(self.store, self._alerts_key, ("\n".join(self._alerts) + "\n").encode())
            self._alerts_waiting = False

    def _open(self) -> None:
        """The first thing that the thread does, as often as it takes."""
        with files.refusals(self.store):
            there = opening.config_there(self.store, self._config)
            lock_rank(self.store, self.rank, self)
            config = {**self._config, **(there or {})}
            if config != there:  # every rank writes the same: each may have a disk of its own
                write_root(self.store, config)
            opening.clean(self.store, self.rank)
            if self.rank == 0 and self._processes is not None:
                opening.clean_gone(self.store, self._processes)
        index = LogIndex(self.store)
        known, start = index.sessions, self._start_step
        if self._after is not None and start and not is_known(known, self._after):
            logger.warning(
                "the checkpoint is of a session that the log at %s does not have: new rows %s",
                files.describe(self.store),
                f"go on from step {start} of its newest one" if known else f"begin at step {start}",
            )
        begun = len(index.history(self.rank)) == len(known)
        self._sessions = continued(known, start, self._after, self._run, has_begun=begun)


def _release(writer: weakref.ref[LogWriter]) -> None:
    """Let others write there: the thread, which does not keep the writer alive, is over."""
    owner = writer()
    if owner is not None:
        release_rank(owner.store, owner.rank, owner)
