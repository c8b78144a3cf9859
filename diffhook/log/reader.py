"""Opening a log for reading."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import zarr
import zarr.errors
from zarr.abc.store import Store

from diffhook.errors import LogError
from diffhook.log import store as files
from diffhook.log.alerts import read_alerts
from diffhook.log.schema import SCHEMA_VERSION
from diffhook.log.snapshots import Snapshot, read_snapshots
from diffhook.log.store import Location
from diffhook.log.table import Table

if TYPE_CHECKING:
    import xarray


class RunLog:
    """A run's log: tables of rows, snapshots, alerts and the configuration they belong to."""

    def __init__(self, store: Store, path: Location) -> None:
        self.store = store
        self._path = path
        self.location = files.describe(store)
        attributes = read_attributes(store)
        self.config: dict[str, Any] = attributes["config"]

    def __repr__(self) -> str:
        return f"<RunLog {self.location}: {len(self.train)} train rows, {len(self.probe)} probe rows>"

    @cached_property
    def train(self) -> Table:
        """Rows of the training's own steps."""
        return self._table("train")

    @cached_property
    def probe(self) -> Table:
        """Rows of probes at snapshots."""
        return self._table("probe")

    @property
    def queries(self) -> Mapping[str, Table]:
        """Query name → its rows.

        Not those whose computation was cut short, or whose snapshots a later session superseded.
        """
        present = {(s.step, s.session) for s in self.snapshots}
        found = {}
        for name in files.names(self.store, "queries"):
            if name == "zarr.json":
                continue
            table = self._table(f"queries/{name}")
            at = (table.description or {}).get("snapshots")
            if at is not None and {(step, session) for step, session in at} <= present:
                found[name] = table
        return found

    @property
    def snapshots(self) -> list[Snapshot]:
        """Snapshots by step."""
        return read_snapshots(self.store, self.session_starts())

    @property
    def ranks(self) -> int:
        """Processes that trained."""
        return sum(1 for _ in self._groups("train"))

    def session_starts(self) -> list[int]:
        """The step at which each session began, as the first rank saw it."""
        for group in self._groups("train"):
            sessions = group.attrs.asdict().get("sessions", [])
            assert isinstance(sessions, list)
            return [int(s["start_step"]) for s in sessions if isinstance(s, dict)]
        return [0]

    def alerts(self) -> list[dict[str, Any]]:
        """Alerts of all ranks, by step."""
        return read_alerts(self.store, self.session_starts())

    def to_xarray(self, table: str = "train") -> xarray.Dataset:
        """One table as a Dataset over the dimension "row" (and "projection_dim").

        Raises:
            LogError: xarray is not installed.
        """
        try:
            import xarray
        except ImportError as error:
            raise LogError("to_xarray needs xarray: pip install diffhook[xarray]") from error
        rows = self._table(table)
        columns = {name: (("row", "projection_dim")[: rows[name].ndim], rows[name]) for name in rows.columns}
        return xarray.Dataset(columns, attrs={"table": table})

    def writable_store(self) -> Store:
        """The same place, for adding queries."""
        return files.open_store(self._path, read_only=False)

    def verify(self) -> list[str]:
        """Read everything once. Returns what is wrong, a line each; empty: the log is whole."""
        problems: list[str] = []
        tables = {"train": self.train, "probe": self.probe}
        tables |= {f"queries/{name}": table for name, table in self.queries.items()}
        for name, table in tables.items():
            try:
                for block in table.blocks():
                    for column in table.columns:
                        table.read(block, column)
            except Exception as error:  # whatever a damaged shard raises is the finding
                problems.append(f"{name}: {error}")
        for snapshot in self.snapshots:
            try:
                snapshot.parameters()
            except LogError as error:
                problems.append(str(error))
        return problems

    def _table(self, name: str) -> Table:
        return Table(name, list(self._groups(name)))

    def _groups(self, table: str) -> Iterator[zarr.Group]:
        for name in files.names(self.store, table):
            if name.startswith("rank-"):
                yield zarr.open_group(self.store, path=f"{table}/{name}", mode="r", use_consolidated=False)


def read_attributes(store: Store) -> dict[str, Any]:
    """The root's own attributes.

    Raises:
        LogError: there is no log there, or one of a newer schema.
    """
    where = files.describe(store)
    try:
        root = zarr.open_group(store, mode="r", use_consolidated=False)
        attributes = root.attrs.asdict().get("diffhook")
    except (FileNotFoundError, zarr.errors.GroupNotFoundError, ValueError, KeyError) as error:
        raise LogError(f"no diffhook log at {where}: it holds no zarr group") from error
    if not isinstance(attributes, dict) or "schema" not in attributes:
        raise LogError(f"no diffhook log at {where}: a zarr group, but not one of diffhook's")
    schema = attributes["schema"]
    if not isinstance(schema, int) or schema > SCHEMA_VERSION:
        raise LogError(
            f"the log at {where} has schema {schema!r}; this diffhook reads up to "
            f"{SCHEMA_VERSION}: upgrade diffhook"
        )
    return attributes


def open_log(path: Location) -> RunLog:
    """Open a run's log for reading. Needs no torch.

    Args:
        path: a folder, an fsspec URL such as "s3://bucket/run", or a zarr Store.

    Raises:
        LogError: nothing is there, or something else.
    """
    return RunLog(files.open_store(path, read_only=True), path)
