"""Writing: rows go to a background thread, which appends whole shards."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import zarr
from zarr.abc.store import Store

from diffhook.errors import LogError
from diffhook.log import alerts
from diffhook.log import store as files
from diffhook.log.reader import read_attributes
from diffhook.log.schema import (
    COLUMNS,
    SCHEMA_VERSION,
    Rows,
    differences,
    json_like,
    projection_dtype,
    rows_per_shard,
)
from diffhook.log.snapshots import Snapshot, write_snapshot
from diffhook.log.store import Location

_QUEUED_BATCHES = 256  # back-pressure: more than this many batches behind, and put() waits

_PARTS = {"train", "probe", "queries", "snapshots", "alerts"}  # other ranks may be here first


class TableWriter:
    """Appends rows to one rank's group of one table. Not thread-safe; one writer per group.

    Rows since the last shard boundary stay in memory, so that a shard begun is rewritten whole.
    """

    def __init__(self, store: Store, path: str, dim: int, dtype: str) -> None:
        self._group = zarr.open_group(store, path=path, mode="a", use_consolidated=False)
        self.shard_rows = rows_per_shard(dim, dtype)
        self._arrays = {c.name: self._array(c.name, dim, dtype) for c in COLUMNS}
        if not dim:
            del self._arrays["projection"]
        committed = min(array.shape[0] for array in self._arrays.values())
        self._boundary = committed // self.shard_rows * self.shard_rows
        self._tail = [{name: np.asarray(a[self._boundary : committed]) for name, a in self._arrays.items()}]
        self._tail_rows = committed - self._boundary

    def _array(self, name: str, dim: int, projection: str) -> Any:
        if name in self._group:
            return self._group[name]
        column = next(c for c in COLUMNS if c.name == name)
        if name != "projection":
            return self._group.create_array(
                name,
                shape=(0,),
                chunks=(self.shard_rows,),
                dtype=column.dtype,
                fill_value=column.fill,
                dimension_names=("row",),
            )
        if not dim:
            return np.empty(0)
        rows = self.shard_rows
        return self._group.create_array(
            name,
            shape=(0, dim),
            shards=(rows, dim),
            chunks=(512 if rows % 512 == 0 else rows, dim),
            dtype=projection,
            fill_value=column.fill,
            compressors=None,  # a projection is noise: it would shrink by 6%, for twice the time
            dimension_names=("row", "projection_dim"),
        )

    def __len__(self) -> int:
        return self._boundary + self._tail_rows

    def begin_session(self, start_step: int) -> int:
        """Rows from here on belong to a run that starts at ``start_step``. Returns its number."""
        sessions = self._group.attrs.asdict().get("sessions", [])
        assert isinstance(sessions, list)
        sessions = [*sessions, {"first_row": len(self), "start_step": start_step}]
        self._group.attrs["sessions"] = sessions
        return len(sessions) - 1

    def describe(self, description: Mapping[str, Any]) -> None:
        """Keep a description of the rows beside them."""
        self._group.attrs["description"] = dict(description)

    def append(self, rows: Rows) -> None:
        """Add rows; whole shards go to disk, the rest waits for more or for :meth:`flush`."""
        if set(rows) != set(self._arrays):
            raise LogError(f"rows have columns {sorted(rows)}, the log {sorted(self._arrays)}")
        self._tail.append(dict(rows))
        self._tail_rows += len(rows["sample"])
        while self._tail_rows >= self.shard_rows:
            joined = self._joined()
            self._write({name: v[: self.shard_rows] for name, v in joined.items()})
            self._boundary += self.shard_rows
            self._tail = [{name: v[self.shard_rows :] for name, v in joined.items()}]
            self._tail_rows -= self.shard_rows

    def flush(self) -> None:
        """Write what waits, as the beginning of a shard."""
        if self._tail_rows:
            joined = self._joined()
            self._write(joined)
            self._tail = [joined]

    def _joined(self) -> dict[str, Any]:
        return {name: np.concatenate([part[name] for part in self._tail]) for name in self._arrays}

    def _write(self, rows: Mapping[str, Any]) -> None:
        stop = self._boundary + len(rows["sample"])
        for name, array in self._arrays.items():  # "sample", the commit mark, is the last
            if array.shape[0] < stop:
                array.resize((stop, *array.shape[1:]))
            array[self._boundary : stop] = rows[name]


class LogWriter:
    """One process's end of a log.

    Args:
        location: folder, URL or Store; created where there is nothing.
        config: the run's configuration; its part "identity" must equal the log's.
        rank: this process's number; rank 0 writes the log's own attributes.
        start_step: the optimiser step at which this process starts.

    Raises:
        LogError: something else is there, or a log of another configuration.
    """

    def __init__(
        self, location: Location, config: Mapping[str, Any], *, rank: int = 0, start_step: int = 0
    ) -> None:
        self.store = files.open_store(location, read_only=False)
        self.rank = rank
        self._open(config)
        projection = config["identity"]["projection"]
        self._dim = int(projection["dim"])
        self._dtype = projection_dtype(projection["kind"])
        self._tables: dict[str, TableWriter] = {}
        self._start_step = start_step
        self.session = self._table("train").begin_session(start_step)
        if f"rank-{rank:04d}" in files.names(self.store, "probe"):
            self._table("probe")  # its rows of an earlier session are superseded from now on
        self._alerts: list[str] | None = None
        self._alerts_key = alerts.key(rank)
        self._alerts_waiting = False
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(_QUEUED_BATCHES)
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="diffhook-writer", daemon=True)
        self._thread.start()

    @property
    def bytes_per_row(self) -> int:
        scalars = sum(np.dtype(c.dtype).itemsize for c in COLUMNS if c.name != "projection")
        return scalars + self._dim * np.dtype(self._dtype).itemsize

    # ── called by the training process ────────────────────────────────────────────────────────

    def put(self, table: str, rows: Rows) -> None:
        """Hand rows over. Waits only when the writer is far behind.

        Raises:
            LogError: an earlier write failed.
        """
        self._submit(lambda: self._table(table).append(rows))

    def snapshot(self, snapshot: Snapshot, parameters: bytes) -> None:
        """Write a snapshot, after the rows handed over before it."""
        self._submit(self._flush_tables)
        self._submit(lambda: write_snapshot(self.store, snapshot, parameters))

    def alert(self, alert: Mapping[str, Any]) -> None:
        """Add one alert to this rank's alerts."""
        line = json.dumps({**alert, "session": self.session})
        self._submit(lambda: self._add_alert(line))

    def record(self, key: str, value: Mapping[str, Any]) -> None:
        """Write a JSON file about the run, such as its measured overhead, beside the tables."""
        content = json.dumps(value, indent=1).encode()
        self._submit(lambda: files.put(self.store, key, content))

    def flush(self) -> None:
        """Wait until everything handed over is on disk.

        Raises:
            LogError: a write failed.
        """
        self._submit(self._flush_tables)
        self._queue.join()
        self._raise()

    def close(self) -> None:
        """Flush and stop the thread. Idempotent.

        Raises:
            LogError: a write failed.
        """
        if not self._thread.is_alive():
            return
        end = json.dumps({"kind": alerts.END, "session": self.session, "step": -1})
        self._queue.put(lambda: self._add_alert(end))
        self._queue.put(self._flush_tables)
        self._queue.put(None)
        self._thread.join()
        self._raise()

    # ── the writer's thread ───────────────────────────────────────────────────────────────────

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            try:
                if self._failure is None:
                    job()
                    if self._queue.empty():
                        self._write_alerts()
            except Exception as error:
                self._failure = error
            finally:
                self._queue.task_done()
        self._queue.task_done()

    def _submit(self, job: Callable[[], None]) -> None:
        self._raise()
        self._queue.put(job)

    def _raise(self) -> None:
        if self._failure is not None:
            raise LogError(
                f"writing to {files.describe(self.store)} failed: {self._failure}; rows written "
                "before are safe"
            ) from self._failure

    def _flush_tables(self) -> None:
        for table in self._tables.values():
            table.flush()
        self._write_alerts()

    def _table(self, name: str) -> TableWriter:
        if name not in self._tables:
            path = f"{name}/rank-{self.rank:04d}"
            self._tables[name] = TableWriter(self.store, path, self._dim, self._dtype)
            if name != "train":
                self._tables[name].begin_session(self._start_step)
        return self._tables[name]

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

    def _made_by_another_rank(self, entries: list[str]) -> bool:
        """Another process was here before rank 0 and made its own groups, no more."""
        root = zarr.open_group(self.store, mode="r", use_consolidated=False)
        return (
            not root.attrs.asdict() and "train" in entries and _PARTS.issuperset({*entries} - {"zarr.json"})
        )

    # ── opening ───────────────────────────────────────────────────────────────────────────────

    def _open(self, config: Mapping[str, Any]) -> None:
        where = files.describe(self.store)
        entries = list(files.names(self.store, ""))
        if "zarr.json" in entries and not self._made_by_another_rank(entries):
            found = read_attributes(self.store)["config"]
            differing = list(differences(found["identity"], json_like(config["identity"])))
            if differing:
                more = f" (and {len(differing) - 5} more)" if len(differing) > 5 else ""
                raise LogError(
                    f"the log at {where} belongs to another configuration: "
                    f"{'; '.join(differing[:5])}{more}. Choose another path, or restore the "
                    "configuration to continue this one"
                )
            return
        foreign = [name for name in entries if name not in _PARTS and name != "zarr.json"]
        if foreign:
            raise LogError(
                f"{where} is not empty and holds no diffhook log (it has {foreign[0]!r}): choose another path"
            )
        if self.rank == 0:
            root = zarr.open_group(self.store, mode="a", use_consolidated=False)
            root.attrs["diffhook"] = {"schema": SCHEMA_VERSION, "config": json_like(config)}
