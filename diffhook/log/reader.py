"""Opening a log for reading."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from zarr.abc.store import Store

from diffhook.errors import LogError
from diffhook.log import store as files
from diffhook.log.alerts import read_alerts
from diffhook.log.rank import RankGroup
from diffhook.log.samples import read_names
from diffhook.log.schema import SCHEMA_VERSION
from diffhook.log.seal import is_sealed, parse, unseal
from diffhook.log.snapshots import Snapshot, read_snapshots
from diffhook.log.store import Location
from diffhook.log.table import Table
from diffhook.log.thumbnails import Thumbnails
from diffhook.notebook import Displayed

if TYPE_CHECKING:
    import xarray

_RANK = re.compile(r"rank-(\d{4,6})")
_KINDS = ("sketch", "full", "none")


class RunLog(Displayed):
    """A run's log: tables of rows, snapshots, alerts and the configuration they belong to."""

    def __init__(self, store: Store, path: Location) -> None:
        self.store = store
        self._path = path
        self.location = files.describe(store)
        attributes = read_attributes(store)
        self.schema: int = attributes["schema"]
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
        for name in query_names(self.store):
            table = self._table(f"queries/{name}")
            if _snapshots_of(table) <= present:
                found[name] = table
        return found

    @property
    def snapshots(self) -> list[Snapshot]:
        """Snapshots by step."""
        return read_snapshots(self.store, self.session_starts())

    @property
    def thumbnails(self) -> Mapping[int, bytes]:
        """Sample id → PNG; empty unless the run was asked to keep them."""
        return Thumbnails(self.store)

    @property
    def ranks(self) -> int:
        """Processes that trained."""
        return len(rank_groups(self.store, "train"))

    def session_starts(self, rank: int | None = None) -> list[int]:
        """The step at which each session began, as one rank saw it; by default the first."""
        for number, group in rank_groups(self.store, "train"):
            if rank is None or number == rank:
                return [session["start_step"] for session in group.sessions] or [0]
        return [0]

    def dropped(self) -> tuple[int, int]:
        """Steps and rows that were not written because the disk could not take them in time."""
        table = self._table("train")  # as it is now
        return table.dropped("steps"), table.dropped("rows")

    def dropped_snapshots(self) -> int:
        """Snapshots that were not written for the same reason."""
        return self._table("train").dropped("snapshots")

    def names(self) -> dict[int, str]:
        """Sample id → name; empty where samples are numbered. See :mod:`diffhook.log.samples`."""
        return read_names(self.store)

    def alerts(self) -> list[dict[str, Any]]:
        """Alerts of all ranks, by step."""
        return read_alerts(self.store, self.session_starts)

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
        from diffhook.log.verification import verify

        return [str(finding) for finding in verify(self.store)]

    def _table(self, name: str) -> Table:
        return Table(name, [group for _, group in rank_groups(self.store, name)])


def rank_groups(store: Store, table: str) -> list[tuple[int, RankGroup]]:
    """The ranks' groups of a table, by number."""
    matches = [_RANK.fullmatch(name) for name in files.names(store, table)]
    return [(int(match[1]), RankGroup(store, f"{table}/{match[0]}")) for match in matches if match]


def query_names(store: Store) -> list[str]:
    """Names of all query sets, finished or not.

    Raises:
        LogError: a name that could lead out of the log.
    """
    return [files.check_name(name) for name in files.names(store, "queries") if name != "zarr.json"]


def _snapshots_of(table: Table) -> set[tuple[int, int]]:
    """The (step, session) of the snapshots that a query was computed at; impossible ones if unfinished."""
    description = table.description
    at = description.get("snapshots") if isinstance(description, dict) else None
    if not isinstance(at, list):
        return {(-1, -1)}
    try:
        return {(int(step), int(session)) for step, session in at}
    except (TypeError, ValueError) as error:
        raise LogError(f"{table.name}: its description is damaged: {error}") from error


def read_attributes(store: Store) -> dict[str, Any]:
    """The root's own attributes: schema and config.

    Raises:
        LogError: there is no log there, or one of a newer schema, or a damaged one.
    """
    where = files.describe(store)
    try:
        content = files.get(store, "zarr.json")
    except OSError as error:
        raise LogError(f"cannot read {where}: {error}") from error
    if content is None:
        raise LogError(f"no diffhook log at {where}: it holds no zarr group")
    place = f"{where}/zarr.json"
    found = parse(content, place)
    own = found.get("attributes") if isinstance(found, dict) else None
    attributes = own.get("diffhook") if isinstance(own, dict) else None
    if not isinstance(attributes, dict) or "schema" not in attributes:
        raise LogError(f"no diffhook log at {where}: a zarr group, but not one of diffhook's")
    schema = attributes["schema"]
    if type(schema) is not int or not 1 <= schema <= SCHEMA_VERSION:
        raise LogError(
            f"the log at {where} has schema {schema!r}; this diffhook reads up to "
            f"{SCHEMA_VERSION}: upgrade diffhook"
        )
    attributes = unseal(attributes, place, required=schema > 1 or is_sealed(attributes))
    _check_config(attributes.get("config"), place)
    return attributes


def _check_config(config: Any, place: str) -> None:
    identity = config.get("identity") if isinstance(config, dict) else None
    projection = identity.get("projection") if isinstance(identity, dict) else None
    if not isinstance(projection, dict):
        raise LogError(f"{place} is damaged: the configuration does not describe the projection")
    dim, kind = projection.get("dim"), projection.get("kind")
    if type(dim) is not int or not 0 <= dim < 1 << 40 or kind not in _KINDS:
        raise LogError(f"{place} is damaged: a projection of kind {kind!r} and dimension {dim!r}")


def open_log(path: Location) -> RunLog:
    """Open a run's log for reading. Needs no torch.

    Args:
        path: a folder, an fsspec URL such as "s3://bucket/run", or a zarr Store.

    Raises:
        LogError: nothing is there, or something else.
    """
    return RunLog(files.open_store(path, read_only=True), path)
