"""Reading everything once: what is damaged, and which rows that costs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from zarr.abc.store import Store

from diffhook.errors import LogError
from diffhook.log import store as files
from diffhook.log import thumbnails
from diffhook.log.alerts import alert_files, read_rank
from diffhook.log.columns import read_layout
from diffhook.log.rank import RankGroup
from diffhook.log.reader import query_names, rank_groups, read_attributes
from diffhook.log.samples import name_files, read_name_file
from diffhook.log.schema import BY_NAME
from diffhook.log.snapshots import ROOT as SNAPSHOTS
from diffhook.log.snapshots import read_snapshot, snapshot_folders

QUARANTINE = "quarantine"  # where a repair moves things to

Step = Callable[[], None]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        key: the file, or the folder, that is damaged.
        message: in words.
        group: key of the rank's group whose rows are lost; "" if none are.
        column: in which column.
        start, stop: rows [start, stop) that are lost.
    """

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
    read_attributes(store)
    found: list[Finding] = []
    for path in table_paths(store):
        found += _gaps(store, path)
        for _, group in rank_groups(store, path):
            found += _check_group(group, advance)
    found += _check_snapshots(store, advance)
    for _, key in alert_files(store):
        found += _attempt(key, partial(read_rank, store, key))
    for key in name_files(store):
        found += _attempt(key, partial(read_name_file, store, key))
    found += _check_thumbnails(store)
    return found


def count_steps(store: Store) -> int:
    """How often :func:`verify` will call ``advance``, nearly."""
    shards = 0
    for path in table_paths(store):
        for _, group in rank_groups(store, path):
            shards += sum(1 for key in files.keys(store, group.path) if "/projection/c/" in key) or 1
    return shards + len(snapshot_folders(store))


def table_paths(store: Store) -> list[str]:
    """Keys of all tables."""
    return ["train", "probe", *(f"queries/{name}" for name in query_names(store))]


def repaired(store: Store) -> list[str]:
    """What earlier repairs have taken out, a line each."""
    lines = []
    for path in table_paths(store):
        for _, group in rank_groups(store, path):
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
    return lines


def _part(key: str) -> str:
    """What a file is a part of: a rank's group, a snapshot, or itself."""
    folders = key.split("/")
    depth = next(
        (i for i, name in enumerate(folders[:-1]) if name.startswith(("rank-", "step-"))), len(folders)
    )
    return "/".join(folders[: depth + 1])


def _gaps(store: Store, path: str) -> Iterator[Finding]:
    ranks = {rank for rank, _ in rank_groups(store, path)}
    for rank in sorted(set(range(min(ranks, default=0), max(ranks, default=0))) - ranks):
        key = f"{path}/rank-{rank:04d}"
        yield Finding(key, "the whole rank is missing", key)


def _check_group(group: RankGroup, advance: Step) -> Iterator[Finding]:
    try:
        _ = group.attributes
    except LogError as error:
        yield Finding(f"{group.path}/zarr.json", str(error), group.path)
        return
    broken = list(_check_layouts(group))
    if broken:
        yield from broken
        return
    try:
        committed = group.committed
    except LogError as error:
        committed = group.attributes.get("committed", 0)
        if committed > len(group.keys) * group.shard_rows:  # absurd: nothing there to go through
            yield Finding(group.path, str(error), group.path)
            return
        group.__dict__["committed"] = committed
    if not group.columns:
        return
    damaged = np.zeros(committed, np.bool_)
    for start in range(0, committed, group.shard_rows):
        stop = min(start + group.shard_rows, committed)
        for finding in _check_shard(group, start, stop):
            damaged[finding.start : finding.stop] = True
            yield finding
        advance()
    if not damaged.any():
        yield from _check_rows(group)


def _check_layouts(group: RankGroup) -> Iterator[Finding]:
    for name in BY_NAME:
        key = f"{group.path}/{name}/zarr.json"
        if any(k.startswith(f"{group.path}/{name}/") for k in group.keys):
            for finding in _attempt(key, partial(read_layout, group.store, group.path, name)):
                yield Finding(key, finding.message, group.path, name)
    if not group.attributes and not group.keys:
        return
    try:
        _ = group.columns
    except LogError as error:
        yield Finding(group.path, str(error), group.path)


def _check_shard(group: RankGroup, start: int, stop: int) -> Iterator[Finding]:
    for name in sorted(group.columns):
        layout = group.layout(name)
        key = layout.chunk_key(group.path, start // group.shard_rows)
        try:
            group.read(name, start, stop)
        except LogError as error:
            rows = layout.inner_rows or group.shard_rows
            for low in range(start, stop, rows):
                high = min(low + rows, stop)
                if _attempt(key, partial(group.read, name, low, high)):
                    reason = str(error).rpartition(f"to {stop - 1}: ")[2]
                    yield Finding(key, f"{name}: {reason}", group.path, name, low, high)


def _check_rows(group: RankGroup) -> Iterator[Finding]:
    """What checksums cannot see: ids, rows without a projection, rows that are there twice."""
    valid = np.flatnonzero(group.valid)
    columns = {
        name: group.read(name, 0, group.committed, group.valid)[valid]
        for name in sorted(group.columns - {"projection"})
    }
    for row in valid[columns["sample"] < 0][:10]:
        key = f"{group.path}/sample"
        yield Finding(key, "no sample id", group.path, "sample", int(row), int(row) + 1)
    bits = np.stack(
        [columns[name].view(f"i{columns[name].itemsize}").astype(np.int64) for name in columns], 1
    )
    _, first = np.unique(bits, axis=0, return_index=True)
    again = np.setdiff1d(np.arange(len(valid)), first)
    if len(again):
        rows = ", ".join(map(str, valid[again][:10])) + (" …" if len(again) > 10 else "")
        yield Finding(group.path, f"{len(again)} rows are there twice: {rows}")


def _check_snapshots(store: Store, advance: Step) -> Iterator[Finding]:
    for folder in snapshot_folders(store):
        key = f"{SNAPSHOTS}/{folder}"
        try:
            snapshot = read_snapshot(store, folder)
            if snapshot is not None:
                snapshot.parameters()
                snapshot.preconditioner()
        except LogError as error:
            yield Finding(key, str(error))
        advance()


def _check_thumbnails(store: Store) -> Iterator[Finding]:
    for name in thumbnails.packs(store):
        key = f"{thumbnails.ROOT}/{name}"
        yield from _attempt(key, partial(thumbnails.check_pack, store, name))


def _attempt(key: str, read: Callable[[], object]) -> list[Finding]:
    try:
        read()
    except LogError as error:
        return [Finding(key, str(error))]
    return []
