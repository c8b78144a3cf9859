"""Opening a log for reading."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from zarr.abc.store import Store

from diffhook.errors import ConfigurationError, LogError
from diffhook.log import store as files
from diffhook.log.alerts import read_alerts
from diffhook.log.grid import read_grid
from diffhook.log.index import LogIndex
from diffhook.log.lineage import Session
from diffhook.log.objective import objective_words, read_objective
from diffhook.log.root import read_config
from diffhook.log.schema import SCHEMA_VERSION
from diffhook.log.snapshots import Snapshot
from diffhook.log.store import Location
from diffhook.log.table import Table
from diffhook.log.verification import verify
from diffhook.notebook import Displayed
from diffhook.words import brief

if TYPE_CHECKING:
    import xarray


class RunLog(Displayed):
    """A run's log: tables of rows, snapshots, alerts and the configuration they belong to.

    What it has read once stays as it was, while a run may still write; see :meth:`refresh`. For the
    arguments see :func:`open_log` and :class:`~diffhook.log.index.LogIndex`.
    """

    def __init__(
        self,
        store: Store,
        path: Location,
        session: int | None = None,
        sessions: Sequence[Session] | None = None,
    ) -> None:
        self.store = store
        self._path = path
        self._seen_as = session, sessions
        self.location = files.describe(store)
        self.config: dict[str, Any] = read_config(store)
        self.schema = SCHEMA_VERSION
        self.index = LogIndex(store, *self._seen_as)

    def __repr__(self) -> str:
        return f"<RunLog {self.location}: {len(self.train)} train rows, {len(self.probe)} probe rows>"

    def refresh(self) -> Self:
        """See what was written since. Tables that were handed out stay as they were.

        Raises:
            LogError: the log is gone.
        """
        self.config = read_config(self.store)
        self.index = LogIndex(self.store, *self._seen_as)
        return self

    @property
    def train(self) -> Table:
        """Rows of the training's own steps."""
        return self.index.table("train")

    @property
    def probe(self) -> Table:
        """Rows of probes at snapshots."""
        return self.index.table("probe")

    @property
    def queries(self) -> Mapping[str, Table]:
        """Query name → its rows.

        Not those whose computation was cut short, or whose snapshots are of another branch.
        """
        return self.index.queries

    @property
    def snapshots(self) -> list[Snapshot]:
        """Snapshots by step."""
        return self.index.snapshots

    @property
    def thumbnails(self) -> Mapping[int, bytes]:
        """Sample id → PNG; empty unless the run was asked to keep them."""
        return self.index.thumbnails

    @property
    def ranks(self) -> int:
        """Processes that have trained, in whichever session."""
        return len(self.index.groups("train"))

    @property
    def live_ranks(self) -> set[int]:
        """Those that train in the live session, or did until it ended."""
        count = len(self.sessions)
        groups = self.index.groups("train").items()
        return {rank for rank, group in groups if count and len(group.sessions) == count}

    @property
    def sessions(self) -> Sequence[Session]:
        """Every start of a run that has left something here; the last one is live."""
        return self.index.sessions

    def dropped(self) -> tuple[int, int]:
        """Steps and rows that were not written because the disk could not take them in time."""
        return self.train.dropped("steps"), self.train.dropped("rows")

    def dropped_snapshots(self) -> int:
        """Snapshots that were not written for the same reason."""
        return self.train.dropped("snapshots")

    def names(self) -> dict[int, str]:
        """Sample id → name; empty where samples are numbered. See :mod:`diffhook.log.samples`."""
        return self.index.names

    @property
    def objective(self) -> dict[str, Any] | None:
        """The training loss, as the hook was told it or recognised it; None where the log does not know.

        Raises:
            LogError: what was recorded of it is damaged.
        """
        return read_objective(self.store, self.config)

    @property
    def objective_words(self) -> str:
        """What is known of it, or why nothing is, in a line; "" where the log says neither."""
        return objective_words(self.store, self.config)

    @property
    def grid(self) -> dict[str, Any] | None:
        """The grid of the probes, as :meth:`diffhook.Grid.describe` gives it; None where there is none.

        Raises:
            LogError: what was recorded of it is damaged.
        """
        return read_grid(self.store, self.config)

    def alerts(self) -> list[dict[str, Any]]:
        """Alerts of all ranks, by step."""
        return read_alerts(self.store, self.index.path)

    def to_xarray(self, table: str = "train") -> xarray.Dataset:
        """One table as a Dataset over the dimension "row" (and "projection_dim").

        Raises:
            LogError: xarray is not installed.
        """
        try:
            import xarray
        except ImportError as error:
            raise LogError("to_xarray needs xarray: pip install 'diffhook[xarray]'") from error
        rows = self.index.table(table)
        columns = {name: (("row", "projection_dim")[: rows[name].ndim], rows[name]) for name in rows.columns}
        return xarray.Dataset(columns, attrs={"table": table})

    def writable_store(self) -> Store:
        """The same place, for adding queries."""
        return files.open_store(self._path, read_only=False)

    def verify(self) -> list[str]:
        """Read everything once. Returns what is wrong, a line each; empty: the log is whole."""
        return [str(finding) for finding in verify(self.store)]


def open_log(path: Location, session: int | None = None) -> RunLog:
    """Open a run's log for reading. Needs no torch.

    Args:
        path: a folder, an fsspec URL such as "s3://bucket/run", or a zarr Store.
        session: the run as this start of it knows it, with what it went on from; by default the newest.
            ``diffhook info`` lists them.

    Raises:
        ConfigurationError: no place at all.
        LogError: nothing is there, or something else, or no such session.
    """
    if not isinstance(path, str | os.PathLike | Store):
        raise ConfigurationError(f"the log is {brief(path)}; expected its folder, URL or store")
    log = RunLog(files.open_store(path, read_only=True), path, session)
    if session is not None:
        _ = log.index.path
    return log
