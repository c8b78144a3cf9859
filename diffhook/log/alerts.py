"""Alerts of a run: JSON lines, each with its checksum, one file for each rank.

A session that ends cleanly says so in a last line of each rank's file, {"kind": "end", …}.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from zarr.abc.store import Store

from diffhook.errors import LogError
from diffhook.log import store as files
from diffhook.log.schema import json_like
from diffhook.log.seal import parse, seal, unseal

if TYPE_CHECKING:
    from diffhook.log.reader import RunLog

END = "end"

Line = dict[str, Any]

_FILE = re.compile(r"rank-(\d{4,6})\.jsonl")


def key(rank: int) -> str:
    """Where a rank's alerts are."""
    return f"alerts/rank-{rank:04d}.jsonl"


def to_line(alert: Mapping[str, Any]) -> str:
    """One line of a file."""
    return json.dumps(seal(json_like(alert)))


def end_line(session: int) -> str:
    """The line that says that a session has ended."""
    return to_line({"kind": END, "session": session, "step": -1})


def write_alerts(store: Store, rank: int, alerts: list[Line]) -> None:
    """Write one rank's alerts, of a run that has ended."""
    lines = [*map(to_line, alerts), end_line(max((a.get("session", 0) for a in alerts), default=0))]
    files.put(store, key(rank), ("\n".join(lines) + "\n").encode())


def read_rank(store: Store, key: str) -> list[Line]:
    """One rank's lines, the end's included.

    Raises:
        LogError: a line is damaged.
    """
    texts = (files.get(store, key) or b"").splitlines()
    return [_line(text, f"{key}, line {number}") for number, text in enumerate(texts, 1)]


def readable_lines(store: Store, key: str) -> bytes:
    """A rank's file without its damaged lines."""
    kept = []
    for text in (files.get(store, key) or b"").splitlines():
        with suppress(LogError):
            _line(text, key)
            kept.append(text + b"\n")
    return b"".join(kept)


def _line(text: bytes, place: str) -> Line:
    line = unseal(parse(text, place), place, required=False)
    if type(line.get("step")) is not int or type(line.get("session", 0)) is not int:
        raise LogError(f"{place} is damaged: it has no step")
    if line.get("session", 0) < 0:
        raise LogError(f"{place} is damaged: session {line['session']}")
    return line


def read_alerts(store: Store, session_starts: Callable[[int], list[int]]) -> list[Line]:
    """Alerts of all ranks, by step; not those of steps that a later session took again.

    Args:
        session_starts: rank → the step at which each of its sessions began.
    """
    found = []
    for rank, lines in _lines(store).items():
        starts = session_starts(rank)
        for line in lines:
            superseded_from = min(starts[line.get("session", 0) + 1 :], default=line["step"] + 1)
            if line.get("kind") != END and line["step"] < superseded_from:
                found.append(line)
    return sorted(found, key=lambda line: line["step"])


def follow_alerts(
    log: RunLog, interval: float = 1.0, stopped: Callable[[], bool] = lambda: False
) -> Iterator[list[Line]]:
    """New alerts of all ranks, in the order in which they were raised, as they come.

    Args:
        log: of a run that still trains, or has ended.
        interval: seconds between looks.
        stopped: asked between looks; ends it.

    Yields:
        What is new at each look, perhaps nothing. Ends when the last session of every rank has.
    """
    read: dict[int, int] = {}
    while True:
        found = _lines(log.store)
        new = [line for rank, lines in found.items() for line in lines[read.get(rank, 0) :]]
        read = {rank: len(lines) for rank, lines in found.items()}
        yield sorted((n for n in new if n.get("kind") != END), key=lambda n: (n.get("time", 0.0), n["step"]))
        ends = [lines[-1] for lines in found.values() if lines and lines[-1].get("kind") == END]
        begun = len(log.session_starts()) - 1
        if len(ends) >= max(log.ranks, 1) and max(end["session"] for end in ends) >= begun:
            return
        for _ in range(10):
            if stopped():
                return
            time.sleep(interval / 10)


def alert_files(store: Store) -> list[tuple[int, str]]:
    """(rank, key) of every rank's file. Others than of a log's own names are not read."""
    matches = [_FILE.fullmatch(name) for name in files.names(store, "alerts")]
    return [(int(match[1]), f"alerts/{match[0]}") for match in matches if match]


def _lines(store: Store) -> dict[int, list[Line]]:
    """Rank → its lines."""
    return {rank: read_rank(store, key) for rank, key in alert_files(store)}
