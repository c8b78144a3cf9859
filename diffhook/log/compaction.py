"""Copying logs into a new one: rows packed into whole shards, or the rows of several logs together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from zarr.abc.store import Store
from zarr.storage import LocalStore

from diffhook.console import progress_bar
from diffhook.errors import ConfigurationError, LogError
from diffhook.log import store as files
from diffhook.log import thumbnails
from diffhook.log.alerts import write_alerts
from diffhook.log.grid import GRID
from diffhook.log.index import LINKED
from diffhook.log.lineage import Session
from diffhook.log.objective import OBJECTIVE
from diffhook.log.reader import RunLog, open_log
from diffhook.log.root import write_root
from diffhook.log.samples import NameWriter
from diffhook.log.schema import Rows, differences, projection_dtype
from diffhook.log.snapshot_writer import copy_snapshot
from diffhook.log.snapshots import Snapshot
from diffhook.log.store import Location
from diffhook.log.table import Table
from diffhook.log.table_writer import TableWriter
from diffhook.log.target import new_store

Change = Callable[[Rows], Rows]


class Aggregation(Protocol):
    """Sums up the rows of a sample at a snapshot; :class:`diffhook.analysis.aggregation.Aggregation`.

    Attributes:
        name: what the sums are for.
    """

    @property
    def name(self) -> str: ...

    def __call__(self, log: RunLog, source: str, write: Callable[[Rows], None]) -> None:
        """Hand over the sums of the rows of "train" or "probe"."""


def compact(
    source: Location,
    target: Location,
    *,
    dim: int | None = None,
    aggregation: Aggregation | None = None,
    progress: bool = True,
) -> None:
    """Copy a log: the rows that count, of all ranks, in whole shards of one group for each table.

    Other branches, what repairs took out and what was never committed stay behind. The copy has one session,
    with the live one's id: a checkpoint of the run goes on in the copy as it does in the log.

    Args:
        source: the log; it is left as it is.
        target: where the copy appears, all at once.
        dim: fold projections to this many numbers; see :func:`fold`.
        aggregation: write sums of the training's and the probes' rows in their place.
        progress: show a progress bar, on a terminal.

    Raises:
        LogError: there is no log, it is damaged, or something is at ``target``.
        ConfigurationError: ``dim`` is no divisor of the log's dimension; or the rows cannot be summed.
    """
    log = open_log(source)
    change = None if dim is None else _folding(log, dim)
    identity = log.config["identity"]
    if dim is not None:
        identity = {**identity, "projection": {**identity["projection"], "dim": dim}}
    if aggregation is not None:
        _check_summable(log)
        identity = {**identity, "aggregate": aggregation.name}
    copy_logs([log], target, {**log.config, "identity": identity}, change, aggregation, progress)


def merge(sources: Sequence[Location], target: Location, *, progress: bool = True) -> None:
    """Put the parts of one run that lie in several logs into one.

    Parts are: other ranks (each machine wrote to its own disk), other steps, other queries. Sample ids
    mean the same samples in all of them. What two logs both hold must be equal.

    Args:
        sources: logs of equal configuration; they are left as they are.
        target: where the copy appears, all at once.
        progress: show a progress bar, on a terminal.

    Raises:
        LogError: no log, a damaged one, or something is at ``target``.
        ConfigurationError: the logs differ in configuration, or contradict each other.
    """
    logs = [open_log(source) for source in sources]
    for log in logs[1:]:
        differing = list(differences(logs[0].config["identity"], log.config["identity"]))
        if differing:
            raise ConfigurationError(
                f"{logs[0].location} and {log.location} are of different configurations; "
                f"at {differing[0].replace('this run', 'the other')}"
            )
    copy_logs(logs, target, logs[0].config, None, None, progress)


@dataclass(frozen=True)
class _Copy:
    """The new log.

    Attributes:
        session: the only one that it has; None: nothing was ever written.
        snapshots: at which steps it has them, or lacks one that the run has written.
        change: what is done to rows on the way.
    """

    store: Store
    config: dict[str, Any]
    session: Session | None
    snapshots: Sequence[int]
    change: Change | None

    def table(self, name: str) -> TableWriter:
        """A new table, of one rank."""
        identity = self.config["identity"]
        dim, kind = identity["projection"]["dim"], identity["projection"]["kind"]
        # A sum of many rows is worth keeping exactly, and there are few of them.
        dtype = "float32" if "aggregate" in identity and name in LINKED else projection_dtype(kind)
        writer = TableWriter(self.store, f"{name}/rank-0000", dim, dtype)
        if name in LINKED and self.session is not None:
            writer.begin_session([self.session])
            if name == "train" and self.snapshots:
                writer.note_snapshots(*self.snapshots)
        return writer

    def changed(self, rows: Rows) -> Rows:
        return rows if self.change is None or not len(rows["sample"]) else self.change(rows)


def copy_logs(
    logs: Sequence[RunLog],
    target: Location,
    config: dict[str, Any],
    change: Change | None,
    aggregation: Aggregation | None,
    progress: bool,
) -> None:
    """Write what the logs hold into a new one."""
    for log in logs:
        _refuse_inside(log, target)
    snapshots = _snapshots(logs)
    tables = _tables(logs)
    ids = [session.id for log in logs for session in log.sessions[-1:]]
    with new_store(target) as store, progress_bar(progress) as bar:
        steps = {s.step for s in snapshots}.union(*(log.index.missing_snapshots for log in logs))
        copy = _Copy(store, config, Session(ids[0], 0) if ids else None, sorted(steps), change)
        blocks = {name: sum(1 for t in parts for _ in t.blocks()) for name, parts in tables.items()}
        task = bar.add_task("copying", total=sum(blocks.values()) + len(snapshots))
        for name, parts in tables.items():
            if aggregation is not None and name in LINKED:
                _sum_table(copy, logs[0], name, parts, aggregation)
                bar.advance(task, blocks[name])
            else:
                _copy_table(copy, name, parts, lambda: bar.advance(task))
        for snapshot in snapshots:
            copy_snapshot(snapshot, store, 0)
            bar.advance(task)
        _copy_rest(store, logs)
        write_root(store, config)  # without it there is no log: so it is the last


def _refuse_inside(log: RunLog, target: Location) -> None:
    """A copy is no part of the log that it is made of."""
    is_folder = not isinstance(target, Store) and "://" not in str(target)
    if is_folder and isinstance(log.store, LocalStore):
        root = log.store.root.resolve()
        if root in Path(str(target)).resolve().parents:
            raise LogError(f"{target} is inside the log at {log.location}: choose a place beside it")


def fold(projection: Any, dim: int) -> Any:
    """(rows, D) → (rows, dim) float32, for a dim that divides D: bucket i goes to i mod dim.

    This is the projection that the same run would have made with ``dim``, up to rounding: element i of
    a parameter lies in bucket (i + h mod D) mod D with a sign that does not depend on D, and
    ((i + h mod D) mod D) mod dim = (i + h mod dim) mod dim.
    """
    rows, full = projection.shape
    return projection.astype(np.float32).reshape(rows, full // dim, dim).sum(1)


def _folding(log: RunLog, dim: int) -> Change:
    projection = log.config["identity"]["projection"]
    if projection["kind"] != "sketch":
        raise ConfigurationError(f"{log.location} holds no sketches ({projection['kind']}): nothing to fold")
    if dim < 1 or projection["dim"] % dim:
        raise ConfigurationError(
            f"dim is {dim}; expected a divisor of the log's {projection['dim']}: only then are the folded "
            "projections those that a run with this dim would have made"
        )

    def change(rows: Rows) -> Rows:
        projection = rows["projection"]
        return {**rows, "projection": fold(projection, dim).astype(projection.dtype)}

    return change


def _copy_table(copy: _Copy, name: str, parts: Sequence[Table], advance: Callable[[], None]) -> None:
    writer = copy.table(name)
    for table in parts:
        for block in table.blocks():
            rows: Rows = {column: table.read(block, column) for column in table.columns}
            writer.append(copy.changed(rows))
            advance()
    _note_dropped(writer, parts)
    writer.flush()
    description = next((t.description for t in parts if t.description), None)
    if description:
        # Every snapshot is of the one session that the copy has.
        at = [[step, 0] for step, _ in description.get("snapshots", [])]
        writer.describe({**description, "snapshots": at})


def _sum_table(copy: _Copy, log: RunLog, name: str, parts: Sequence[Table], aggregation: Aggregation) -> None:
    writer = copy.table(name)
    if len(log.train if name == "train" else log.probe):
        aggregation(log, name, lambda rows: writer.append(copy.changed(rows)))
    _note_dropped(writer, parts)
    writer.flush()


def _note_dropped(writer: TableWriter, parts: Sequence[Table]) -> None:
    counts = {what: sum(table.dropped(what) for table in parts) for what in ("steps", "rows", "snapshots")}
    if any(counts.values()):
        writer.note_dropped(**counts)


def _check_summable(log: RunLog) -> None:
    kept = log.config["identity"].get("aggregate")
    if kept is not None:
        raise ConfigurationError(f"{log.location} holds sums of rows already, for {kept}")
    taken = {snapshot.step for snapshot in log.snapshots}
    for name, table in log.queries.items():
        asked = set(table["step"].tolist())
        if asked != taken and not table.description.get("preconditioned"):  # those ask the rows themselves
            raise ConfigurationError(
                f"queries {name!r} are at {len(asked)} of the log's {len(taken)} snapshots, and sums are at "
                "each of them: compute the queries anew, with overwrite"
            )


def _copy_rest(store: Store, logs: Sequence[RunLog]) -> None:
    alerts = {
        (a["step"], a.get("kind"), a.get("message")): {**a, "session": 0}
        for log in logs
        for a in log.alerts()
    }
    if alerts:
        write_alerts(store, 0, list(alerts.values()))
    names = {sample: name for log in logs for sample, name in log.names().items()}
    names_writer = NameWriter(store, 0)
    names_writer.keep(names)
    names_writer.flush()
    images = thumbnails.ThumbnailWriter(store, 0)
    for log in logs:
        for sample_id, png in log.thumbnails.items():
            images.add(sample_id, png)
    images.flush()
    for name in ("plan.json", "summary.json", OBJECTIVE, GRID):
        contents = (files.get(log.store, name) for log in logs)
        content = next((found for found in contents if found is not None), None)
        if content is not None:
            files.put(store, name, content)


def _snapshots(logs: Sequence[RunLog]) -> list[Snapshot]:
    found: dict[int, tuple[RunLog, Snapshot]] = {}
    for log in logs:
        for snapshot in log.snapshots:
            other, own = found.setdefault(snapshot.step, (log, snapshot))
            if own.digest != snapshot.digest:
                raise ConfigurationError(
                    f"{other.location} and {log.location} have different parameters at step "
                    f"{snapshot.step}: they are two runs, not parts of one"
                )
    return [found[step][1] for step in sorted(found)]


def _tables(logs: Sequence[RunLog]) -> dict[str, list[Table]]:
    """Table → where its rows lie, each row once."""
    found = {"train": _parts([log.train for log in logs]), "probe": _parts([log.probe for log in logs])}
    for log in logs:
        for name, table in log.queries.items():
            found.setdefault(f"queries/{name}", []).append(table)
    for name, parts in found.items():
        if name.startswith("queries/"):
            found[name] = _parts(parts)
            if len(found[name]) > 1:
                raise ConfigurationError(f"two of the logs have different rows in {name}: rename one")
    return found


def _parts(tables: Sequence[Table]) -> list[Table]:
    """The tables that hold rows, or have left some out, without copies of each other.

    Raises:
        ConfigurationError: two hold different rows of the same rank and steps.
    """
    parts: list[Table] = []
    for table in tables:
        holds = len(table) or table.dropped("steps") or table.dropped("snapshots")
        if holds and not any(_same(table, other) for other in parts):
            for other in parts:
                _refuse_overlap(other, table)
            parts.append(table)
    return parts


def _same(one: Table, other: Table) -> bool:
    scalars = [c for c in one.columns if c != "projection"]
    return one.columns == other.columns and all(
        np.array_equal(one[c], other[c], equal_nan=one[c].dtype.kind == "f") for c in scalars
    )


def _refuse_overlap(one: Table, other: Table) -> None:
    for a in one.groups:
        for b in other.groups:
            if a.path == b.path:
                steps = np.intersect1d(a.column("step"), b.column("step"))
                if len(steps):
                    raise ConfigurationError(
                        f"two of the logs have different rows of {a.path}, step {steps[0]}: they are two "
                        "runs, not parts of one"
                    )
