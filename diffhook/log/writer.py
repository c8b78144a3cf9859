"""Writing a log: whatever a run hands over goes to a background thread, and from there to the store."""

from __future__ import annotations

import json
import logging
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from zarr.abc.store import Store

from diffhook.errors import LogError
from diffhook.log import alerts
from diffhook.log import store as files
from diffhook.log.backlog import Backlog
from diffhook.log.lock import ROOT as LOCKS
from diffhook.log.lock import lock_rank, release_rank
from diffhook.log.rank import group_json
from diffhook.log.reader import read_attributes
from diffhook.log.samples import NameWriter
from diffhook.log.schema import (
    COLUMNS,
    SCALARS,
    SCHEMA_VERSION,
    Rows,
    differences,
    json_like,
    projection_dtype,
)
from diffhook.log.seal import seal
from diffhook.log.snapshots import Snapshot, write_snapshot
from diffhook.log.store import Location
from diffhook.log.table_writer import TableWriter
from diffhook.log.thumbnails import ThumbnailWriter, check_png

logger = logging.getLogger("diffhook")


_PARTS = {"train", "probe", "queries", "snapshots", "alerts", "thumbnails", "quarantine", "names", LOCKS}


class LogWriter:
    """One process's end of a log.

    Args:
        location: folder, URL or Store; created where there is nothing.
        config: the run's configuration; its part "identity" must equal the log's.
        rank: this process's number.
        start_step: the optimiser step at which this process starts.
        memory: bytes of rows that may wait for the disk, besides up to five shards of each table.
        patience: seconds that :meth:`put` waits for room there, once, until half of it is written.
        strict: the first write that fails is not tried again: the next call raises.

    Raises:
        LogError: something else is there, or a log of another configuration or an older schema; or
            another process is writing this rank (in folders; object stores are not guarded).
    """

    def __init__(
        self,
        location: Location,
        config: Mapping[str, Any],
        *,
        rank: int = 0,
        start_step: int = 0,
        memory: int = 256 << 20,
        patience: float = 1.0,
        strict: bool = False,
    ) -> None:
        self.store = files.open_store(location, read_only=False)
        self.rank = rank
        self._open(config)
        projection = config["identity"]["projection"]
        self._dim = int(projection["dim"])
        self._dtype = projection_dtype(projection["kind"])
        self._tables: dict[str, TableWriter] = {}
        self._start_step = start_step
        self._closed = False
        self._alerts: list[str] | None = None
        self._alerts_key = alerts.key(rank)
        self._alerts_waiting = False
        self._thumbnails: ThumbnailWriter | None = None
        self._names = NameWriter(self.store, rank)
        self._dropped: dict[str, tuple[int, int]] = {}
        self.dropped_snapshots = 0
        self.session = self._table("train").begin_session(start_step)
        if f"rank-{rank:04d}" in files.names(self.store, "probe"):
            self._table("probe")  # its rows of an earlier session are superseded from now on
        self._backlog = Backlog(
            files.describe(self.store),
            memory=memory,
            patience=patience,
            strict=strict,
            ended=partial(_release, weakref.ref(self)),
        )

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
        taken = self._backlog.offer(lambda: self._table(table).append(rows), size)
        if taken:
            self._submit(lambda: self._commit_tables() if self._backlog.idle else None)
            return True
        steps, count = self._dropped.get(table, (0, 0))
        if not self._dropped and not self._backlog.failing:
            logger.warning(
                "diffhook leaves out steps: %s cannot take rows as fast as they come",
                files.describe(self.store),
            )
        self._dropped[table] = (steps + 1, count + len(rows["sample"]))
        return False

    def snapshot(self, snapshot: Snapshot, parameters: bytes, preconditioner: bytes | None = None) -> bool:
        """Write a snapshot, after the rows handed over before it, which it waits for where memory holds
        not both: as long as the disk works.

        Returns:
            False: the disk fails or hangs, and the snapshot is left out; the log says how many were.

        Raises:
            LogError: writing failed for good.
        """
        self._submit(self._flush_tables)
        size = len(parameters) + len(preconditioner or b"")
        taken = self._backlog.offer_patiently(
            lambda: write_snapshot(self.store, snapshot, parameters, preconditioner), size
        )
        if not taken:
            self.dropped_snapshots += 1
            logger.warning(
                "diffhook leaves out the snapshot of step %d: %s cannot take it, %s",
                snapshot.step, files.describe(self.store), self._backlog.trouble,
            )  # fmt: skip
        return taken

    def alert(self, alert: Mapping[str, Any]) -> None:
        """Add one alert to this rank's alerts. Always taken, however far behind the disk is: they are few."""
        line = alerts.to_line({**alert, "session": self.session})
        self._submit(lambda: self._add_alert(line))
        self._submit(lambda: self._write_alerts() if self._backlog.idle else None)

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
        self._names.keep(names)

    def record(self, key: str, value: Mapping[str, Any]) -> None:
        """Write a JSON file about the run, such as its measured overhead, beside the tables."""
        content = json.dumps(value, indent=1).encode()
        self._submit(lambda: files.put(self.store, key, content))  # always taken: they are few and small

    def flush(self, timeout: float = 60.0) -> None:
        """Wait until everything handed over is on disk, ``timeout`` seconds at most.

        Raises:
            LogError: it could not be written in that time.
        """
        self._submit(self._flush_tables)
        self._backlog.drain(timeout)

    def close(self, timeout: float = 60.0) -> None:
        """Flush and stop the thread. Idempotent.

        Args:
            timeout: seconds without progress after which the rest is given up; 10 at most where the
                disk fails. One that works is waited for, however slow it is.

        Raises:
            LogError: not everything could be written.
        """
        if self._closed:
            return
        self._closed = True
        try:
            end = alerts.end_line(self.session)
            self._submit(lambda: self._add_alert(end))
            self._submit(self._flush_tables)
        finally:
            self._backlog.close(timeout)

    # ── the writer's thread ───────────────────────────────────────────────────────────────────

    def _submit(self, job: Callable[[], None], size: int = 0) -> bool:
        return self._backlog.offer(job, size)

    def _commit_tables(self) -> None:
        for table in self._tables.values():
            table.commit()

    def _flush_tables(self) -> None:
        for name, table in self._tables.items():
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

    def _table(self, name: str) -> TableWriter:
        if name not in self._tables:
            path = f"{name}/rank-{self.rank:04d}"
            table = TableWriter(self.store, path, self._dim, self._dtype, self._names.flush)
            if name != "train":
                table.begin_session(self._start_step)
            self._tables[name] = table
        return self._tables[name]

    def _add_thumbnail(self, sample_id: int, png: bytes) -> None:
        if self._thumbnails is None:
            self._thumbnails = ThumbnailWriter(self.store, self.rank)
        self._thumbnails.add(sample_id, png)

    def _add_alert(self, line: str) -> None:
        if self._alerts is None:
            self._alerts = (files.get(self.store, self._alerts_key) or b"").decode().splitlines()
        self._alerts.append(line)
        self._alerts_waiting = True

    def _write_alerts(self) -> None:
        """The whole file anew: an object store knows no appending. So not after every alert."""
        if self._alerts_waiting and self._alerts:
            files.put(self.store, self._alerts_key, ("\n".join(self._alerts) + "\n").encode())
            self._alerts_waiting = False

    # ── opening ───────────────────────────────────────────────────────────────────────────────

    def _open(self, config: Mapping[str, Any]) -> None:
        where = files.describe(self.store)
        entries = list(files.names(self.store, ""))
        if "zarr.json" in entries:
            self._check_same(config, where)
        else:
            foreign = [name for name in entries if name not in _PARTS]
            if foreign:
                raise LogError(
                    f"{where} is not empty and holds no diffhook log (it has {foreign[0]!r}): choose "
                    "another path"
                )
        lock_rank(self.store, self.rank, self)
        if "zarr.json" not in entries:  # every rank writes the same: each may have a disk of its own
            write_root(self.store, config)
        self._clean()

    def _check_same(self, config: Mapping[str, Any], where: str) -> None:
        attributes = read_attributes(self.store)
        differing = list(differences(attributes["config"]["identity"], json_like(config["identity"])))
        if differing:
            more = f" (and {len(differing) - 5} more)" if len(differing) > 5 else ""
            raise LogError(
                f"the log at {where} belongs to another configuration: "
                f"{'; '.join(differing[:5])}{more}. Choose another path, or restore the "
                "configuration to continue this one"
            )
        if attributes["schema"] < SCHEMA_VERSION:
            raise LogError(
                f"the log at {where} has schema {attributes['schema']}, which is read but not written: "
                "to continue it, copy it with `diffhook compact`"
            )

    def _clean(self) -> None:
        """What an earlier process was killed in the middle of."""
        files.clean(self.store, "", older_than=60.0)  # other ranks begin at the same time
        if self.rank == 0:
            files.clean(self.store, "snapshots")
        for part in ("alerts", "thumbnails"):
            files.clean(self.store, part, only=f"rank-{self.rank:04d}")


def _release(writer: weakref.ref[LogWriter]) -> None:
    """Let others write there: the thread, which does not keep the writer alive, is over."""
    owner = writer()
    if owner is not None:
        release_rank(owner.store, owner.rank, owner)


def write_root(store: Store, config: Mapping[str, Any]) -> None:
    """Write what makes a place a log, and the groups of its tables."""
    for table in ("train", "probe"):
        files.set_uncommitted(store, f"{table}/zarr.json", group_json({}))
    attributes = {"diffhook": seal({"schema": SCHEMA_VERSION, "config": json_like(config)})}
    files.put(store, "zarr.json", group_json(attributes))
