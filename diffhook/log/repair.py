"""Taking damaged parts out of a log. Nothing is deleted: it moves to LOG/quarantine/."""

from __future__ import annotations

from collections import defaultdict
from contextlib import ExitStack
from typing import Any

import numpy as np
from zarr.abc.store import Store

from diffhook.log import store as files
from diffhook.log.alerts import alert_files, readable_lines
from diffhook.log.encoding import put_chunk
from diffhook.log.index import LogIndex
from diffhook.log.lock import rank_lock
from diffhook.log.mark import put_attributes
from diffhook.log.rank import RankGroup
from diffhook.log.schema import BY_NAME
from diffhook.log.verification import QUARANTINE, Finding, Kind


def repair(store: Store, findings: list[Finding]) -> list[str]:
    """Quarantine what :func:`verify` found. All other rows stay as they are, and readable.

    Rows of a damaged chunk no longer count; the chunk's file moves aside, and one that holds its
    readable rows takes its place. So do the readable lines of a damaged file of alerts. Damaged metadata
    takes its rank's whole group aside. Rows that are there twice stay: nobody knows which is the right one.

    Returns:
        What was done, a line each.

    Raises:
        LogError: the log is being written: its run would end, because somebody writes beside it.
    """
    with ExitStack() as locks:  # no run writes meanwhile
        for rank in LogIndex(store).groups("train"):
            locks.enter_context(rank_lock(store, rank))
        return _repair(store, findings)


def _repair(store: Store, findings: list[Finding]) -> list[str]:
    done = []
    alert_keys = {key for _, key in alert_files(store)}
    for finding in findings:
        if finding.kind is Kind.FILE:
            kept = readable_lines(store, finding.key) if finding.key in alert_keys else b""
            done.append(_quarantine(store, finding.key))
            if kept:
                files.put(store, finding.key, kept)
    whole = {f.group for f in findings if f.kind is Kind.GROUP}
    rows: dict[str, list[Finding]] = defaultdict(list)
    for finding in findings:
        if finding.kind in (Kind.ROWS, Kind.NO_SAMPLE) and finding.group not in whole:
            rows[finding.group].append(finding)
    for group, lost in rows.items():
        done += _take_out(store, group, lost)
    done += [_quarantine(store, group) for group in sorted(whole) if list(files.keys(store, group))]
    _note_lost_snapshots(store)
    files.commit(store)
    return done


def _note_lost_snapshots(store: Store) -> None:
    """Readers need not be told any more of those that are gone, or were moved aside."""
    index = LogIndex(store)
    lost = index.expected_snapshots - {(s.step, s.session) for s in index.all_snapshots}
    for group in index.groups("train").values():
        sessions = []
        for number, session in enumerate(group.sessions):
            gone = [step for step in session.get("snapshots", []) if (step, number) in lost]
            noted = {"lost_snapshots": sorted({*session.get("lost_snapshots", []), *gone})} if gone else {}
            sessions.append({**session, **noted})
        if sessions != group.sessions:
            put_attributes(store, group.path, {**group.attributes, "sessions": sessions})


def _take_out(store: Store, path: str, findings: list[Finding]) -> list[str]:
    group = RankGroup(store, path)
    lost = np.zeros(group.marked, np.bool_)
    for start, stop in [*group.lost, *((f.start, f.stop) for f in findings)]:
        lost[start:stop] = True
    edges = np.flatnonzero(np.diff(np.concatenate([[0], lost, [0]]))).tolist()
    ranges = [list(pair) for pair in zip(edges[::2], edges[1::2], strict=True)]
    put_attributes(store, path, {**group.attributes, "lost": ranges})
    done = []
    in_files = [f for f in findings if f.kind is Kind.ROWS]
    for key in dict.fromkeys(f.key for f in in_files):
        of_key = [f for f in in_files if f.key == key]
        content = _salvaged(group, of_key, len(lost))
        done.append(_quarantine(store, key))
        _replace(group, of_key[0], content, len(lost))
    count = sum(f.stop - f.start for f in {(f.start, f.stop): f for f in findings}.values())
    done.append(f"{path}: {count} rows no longer count")
    return done


def _span(group: RankGroup, finding: Finding, committed: int) -> tuple[int, int]:
    start = finding.start // group.shard_rows * group.shard_rows
    return start, min(start + group.shard_rows, committed)


def _salvaged(group: RankGroup, findings: list[Finding], committed: int) -> Any:
    """The rows of a shard, with the fill value in place of those that cannot be read."""
    column = findings[0].column
    layout = group.layout(column)
    start, stop = _span(group, findings[0], committed)
    shape = (stop - start, *([] if layout.dim is None else [layout.dim]))
    values = np.full(shape, BY_NAME[column].fill, layout.dtype)
    damaged = {f.start for f in findings}
    rows = layout.inner_rows or group.shard_rows
    for low in range(start, stop, rows):
        if low not in damaged:
            high = min(low + rows, stop)
            values[low - start : high - start] = group.read(column, low, high)
    return values


def _replace(group: RankGroup, finding: Finding, values: Any, committed: int) -> None:
    start, _ = _span(group, finding, committed)
    put_chunk(group.store, group.path, group.layout(finding.column), start, values)
    files.commit(group.store)


def _quarantine(store: Store, key: str) -> str:
    """Move a file, or everything below a folder, aside."""
    keys = [key] if files.exists(store, key) else list(files.keys(store, key))
    number = 0
    while list(files.keys(store, f"{QUARANTINE}/{number:03d}/{key}")) or files.exists(
        store, f"{QUARANTINE}/{number:03d}/{key}"
    ):
        number += 1
    for one in keys:
        files.move(store, one, f"{QUARANTINE}/{number:03d}/{one}")
    return f"{key} moved to {QUARANTINE}/{number:03d}/{key}" if keys else f"{key} is gone"
