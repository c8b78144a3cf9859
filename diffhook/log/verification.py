"""Reading everything once: what is damaged, and which rows that costs."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from functools import partial

import numpy as np
from zarr.abc.store import Store

from diffhook.errors import LogError, LogUnavailableError
from diffhook.log import store as files
from diffhook.log import thumbnails
from diffhook.log.alerts import alert_files, read_rank
from diffhook.log.index import LINKED, LogIndex
from diffhook.log.lineage import Session, longest, path_to
from diffhook.log.rank import DamagedRowsError, RankGroup
from diffhook.log.reference import MovedCheckpointError
from diffhook.log.root import read_config
from diffhook.log.samples import name_files, read_name_file
from diffhook.log.schema import BY_NAME
from diffhook.log.snapshots import ROOT as SNAPSHOTS
from diffhook.log.snapshots import folder_of, read_snapshot, snapshot_folders

QUARANTINE = "quarantine"  # where a repair moves things to

Step = Callable[[], None]


class Kind(Enum):
    """What is to be done about a finding."""

    FILE = "a file, or a folder of files, is damaged"
    GROUP = "all rows of a rank's group are lost"
    ROWS = "some rows are lost with the file that holds them"
    NO_SAMPLE = "some rows say of no sample that they are its own"
    TOLD = "nothing can be done"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        kind: what it costs.
        key: the file, or the folder, that is damaged.
        message: in words.
        group: key of the rank's group whose rows are lost; "" if none are.
        column: in which column.
        start, stop: rows [start, stop) that are lost.
    """

    kind: Kind
    key: str
    message: str
    group: str = ""
    column: str = ""
    start: int = 0
    stop: int = 0

    def __str__(self) -> str:
        if not self.group:
            return f"{self.key}: {self.message}"
        what = f"rows {self.start} to {self.stop - 1}" if self.stop > self.start else "all rows"
        return f"{self.group}: {what} are lost: {self.message}"


def verify(store: Store, advance: Step = lambda: None) -> list[Finding]:
    """Read everything, with checksums.

    Args:
        advance: called after each file or shard.

    Raises:
        LogError: there is no log, or its own attributes are damaged.
    """
    read_config(store)
    index = LogIndex(store)
    found: list[Finding] = []
    sessions, contradictions = _readable_sessions(index)
    live = path_to(sessions)
    for path in table_paths(index):
        found += _gaps(index, path)
        for group in index.groups(path).values():
            lineage = (lambda: live) if path in LINKED else None
            found += _check_group(RankGroup(store, group.path, lineage), advance)
        found += _copied_groups(index, path)
    found += contradictions
    found += _check_snapshots(index, advance)
    for _, key in alert_files(store):
        found += _attempt(key, partial(read_rank, store, key))
    for key in name_files(store):
        found += _attempt(key, partial(read_name_file, store, key))
    found += _check_thumbnails(store)
    return found


def count_steps(store: Store) -> int:
    """How often :func:`verify` will call ``advance``, nearly."""
    index = LogIndex(store)
    shards = 0
    for path in table_paths(index):
        for group in index.groups(path).values():
            shards += sum(1 for key in files.keys(store, group.path) if "/projection/c/" in key) or 1
    return shards + len(snapshot_folders(store))


def table_paths(index: LogIndex) -> list[str]:
    """Keys of all tables."""
    return [*LINKED, *(f"queries/{name}" for name in index.query_names)]


def repaired(store: Store) -> list[str]:
    """What earlier repairs have taken out, a line each."""
    lines = []
    index = LogIndex(store)
    for path in table_paths(index):
        for group in index.groups(path).values():
            rows = sum(stop - start for start, stop in group.lost)
            if rows:
                lines.append(f"{group.path}: {rows} rows were taken out by an earlier repair")
    told = {line.partition(":")[0] for line in lines}
    for number in files.names(store, QUARANTINE):
        moved: dict[str, list[str]] = defaultdict(list)
        for key in files.keys(store, f"{QUARANTINE}/{number}"):
            key = key.removeprefix(f"{QUARANTINE}/{number}/")
            moved[_part(key)].append(key)
        for part, keys in moved.items():
            if part not in told or any(key.endswith("/zarr.json") for key in keys):
                lines.append(f"{part} was taken out by an earlier repair: {QUARANTINE}/{number}/{part}")
    gone = {f"{SNAPSHOTS}/{folder_of(*at)}" for at in index.lost_snapshots}
    kept = {line.partition(" was ")[0] for line in lines}
    return [*lines, *(f"{part} was gone when an earlier repair looked" for part in sorted(gone - kept))]


def _part(key: str) -> str:
    """What a file is a part of: a rank's group, a snapshot, or itself."""
    folders = key.split("/")
    depth = next(
        (i for i, name in enumerate(folders[:-1]) if name.startswith(("rank-", "step-"))), len(folders)
    )
    return "/".join(folders[: depth + 1])


def _gaps(index: LogIndex, path: str) -> Iterator[Finding]:
    ranks = set(index.groups(path))
    expected = set(range(min(ranks, default=0), max(ranks, default=0)))
    if path == "train" and (index.groups("probe") or snapshot_folders(index.store)):
        expected.add(0)  # begins its rows before it takes a snapshot
    for rank in sorted(expected - ranks):
        key = f"{path}/rank-{rank:04d}"
        yield Finding(Kind.GROUP, key, "the whole rank is missing", key)


def _copied_groups(index: LogIndex, path: str) -> Iterator[Finding]:
    """Ranks all of whose rows are another's: somebody has copied a folder."""
    first: dict[bytes, str] = {}
    for group in index.groups(path).values():
        with suppress(LogError):  # damage is told elsewhere
            if group.committed:
                found = hashlib.sha256()
                for name in ("step", "sample", "grad_norm"):
                    found.update(group.read(name, 0, group.committed).tobytes())
                other = first.setdefault(found.digest(), group.path)
                if other != group.path:
                    message = f"all its rows are those of {other}, and count twice"
                    yield Finding(Kind.TOLD, group.path, message)


def _readable_sessions(index: LogIndex) -> tuple[Sequence[Session], list[Finding]]:
    """The sessions as those ranks tell them whose marks can be read, and whether they agree."""
    groups = [group for table in LINKED for group in index.groups(table).values()]
    damaged = {g.path for g in groups if _attempt(g.path, partial(getattr, g, "attributes"))}
    histories = [group.history for group in groups if group.path not in damaged]
    contradictions = _attempt("train", lambda: longest(histories), Kind.TOLD)
    return max(histories, key=len, default=()), contradictions


def _check_group(group: RankGroup, advance: Step) -> Iterator[Finding]:
    damage = _attempt(f"{group.path}/zarr.json", lambda: group.attributes, Kind.GROUP, group.path)
    damage = damage or list(_check_layouts(group))
    if not damage and not _is_plausible(group):
        damage = _attempt(group.path, lambda: group.committed, Kind.GROUP, group.path)
    yield from damage
    if damage or not group.columns:
        return
    damaged = np.zeros(group.marked, np.bool_)
    for start in range(0, group.marked, group.shard_rows):
        stop = min(start + group.shard_rows, group.marked)
        for finding in _check_shard(group, start, stop):
            damaged[finding.start : finding.stop] = True
            yield finding
        advance()
    if not damaged.any():
        yield from _check_rows(group)


def _is_plausible(group: RankGroup) -> bool:
    """Whether there is something to go through: a mark alone can claim any number of rows."""
    return not group.columns or group.marked <= len(group.keys) * group.shard_rows


def _check_layouts(group: RankGroup) -> Iterator[Finding]:
    for name in BY_NAME:
        key = f"{group.path}/{name}/zarr.json"
        if any(k.startswith(f"{group.path}/{name}/") for k in group.keys):
            yield from _attempt(key, partial(group.stored, name), Kind.GROUP, group.path)
    yield from _attempt(group.path, lambda: group.columns, Kind.GROUP, group.path)


def _check_shard(group: RankGroup, start: int, stop: int) -> Iterator[Finding]:
    for name in sorted(group.columns):
        layout = group.layout(name)
        if _damage(group, name, start, stop) is None:
            continue
        key = layout.chunk_key(group.path, start // group.shard_rows)
        rows = layout.inner_rows or group.shard_rows
        for low in range(start, stop, rows):
            high = min(low + rows, stop)
            reason = _damage(group, name, low, high)
            if reason is not None:
                yield Finding(Kind.ROWS, key, f"{name}: {reason}", group.path, name, low, high)


def _damage(group: RankGroup, column: str, start: int, stop: int) -> str | None:
    """Why rows cannot be read; None where they can."""
    try:
        group.read(column, start, stop)
    except DamagedRowsError as error:
        return error.reason
    return None


def _check_rows(group: RankGroup) -> Iterator[Finding]:
    """What checksums cannot see: ids, rows that are there twice."""
    counted = np.flatnonzero(group.valid)
    columns = {
        name: group.read(name, 0, group.committed, group.valid)[counted]
        for name in sorted(group.columns - {"projection"})
    }
    for row in counted[columns["sample"] < 0][:10].tolist():
        key = f"{group.path}/sample"
        yield Finding(Kind.NO_SAMPLE, key, "no sample id", group.path, "sample", row, row + 1)
    bits = np.stack(
        [columns[name].view(f"i{columns[name].itemsize}").astype(np.int64) for name in columns], 1
    )
    _, first = np.unique(bits, axis=0, return_index=True)
    again = np.setdiff1d(np.arange(len(counted)), first)
    if len(again):
        rows = ", ".join(map(str, counted[again][:10])) + (" …" if len(again) > 10 else "")
        yield Finding(Kind.TOLD, group.path, f"{len(again)} rows are there twice: {rows}")


def _check_snapshots(index: LogIndex, advance: Step) -> Iterator[Finding]:
    expected = {folder_of(*written) for written in index.expected_snapshots}
    for folder in snapshot_folders(index.store, index.expected_snapshots):
        key = f"{SNAPSHOTS}/{folder}"
        try:
            snapshot = read_snapshot(index.store, folder)
            if snapshot is not None:
                snapshot.check()
            elif folder in expected:
                yield Finding(Kind.FILE, key, "the run has written it, and it is gone")
        except MovedCheckpointError as error:
            yield Finding(Kind.TOLD, key, str(error))  # the log is as it was
        except LogError as error:
            yield Finding(Kind.FILE, key, str(error))
        advance()


def _check_thumbnails(store: Store) -> Iterator[Finding]:
    for name in thumbnails.packs(store):
        key = f"{thumbnails.ROOT}/{name}"
        yield from _attempt(key, partial(thumbnails.check_pack, store, name))


def _attempt(key: str, read: Callable[[], object], kind: Kind = Kind.FILE, group: str = "") -> list[Finding]:
    """What is wrong if ``read`` fails. A store that does not answer says nothing of the log."""
    try:
        read()
    except LogUnavailableError:
        raise
    except LogError as error:
        return [Finding(kind, key, str(error), group)]
    return []
