"""Alerts of a run: JSON lines, each with its checksum, one file for each rank.

A session that ends cleanly says so in a last line of each rank's file, {"kind": "end", …}.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from zarr.abc.store import Store

from diffhook.errors import LogError
from diffhook.log import store as files
from diffhook.log.checksum import parse, verified, with_checksum
from diffhook.log.lineage import Path
from diffhook.log.schema import json_like

END = "end"
THROTTLE = "throttle"
"""The kind of a record that says with which factor, its value, a sample's loss counts from then on."""

Line = dict[str, Any]

_LEAST: Line = {
    "kind": "", "level": "info", "message": "", "samples": [], "step": None, "session": 0, "rank": 0,
    "time": 0.0,
}  # fmt: skip
_FILE = re.compile(r"rank-(\d{4,6})\.jsonl")


def key(rank: int) -> str:
    """Where a rank's alerts are."""
    return f"alerts/rank-{rank:04d}.jsonl"


def to_line(alert: Mapping[str, Any]) -> str:
    """One line of a file."""
    return json.dumps(with_checksum(json_like(alert)))


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
    line = {**_LEAST, **verified(parse(text, place), place)}
    sound = (
        _is_count(line["session"])
        and type(line["step"]) is int
        and abs(line["step"]) < 1 << 48
        and all(isinstance(line[key], str) for key in ("kind", "level", "message"))
        and isinstance(line["samples"], list)
        and all(_is_count(sample) for sample in [*line["samples"], line["rank"]])
        and isinstance(line["time"], int | float)
    )
    if not sound:
        raise LogError(f"{place} is damaged: no alert of a step of a session")
    return line


def _is_count(found: Any) -> bool:
    return type(found) is int and 0 <= found < 1 << 53


def read_alerts(store: Store, path: Path) -> list[Line]:
    """Alerts of all ranks on a path of sessions, by step."""
    found = [
        line
        for lines in all_lines(store).values()
        for line in lines
        if line.get("kind") != END and _counts(line, path)
    ]
    return sorted(found, key=lambda line: line["step"])


def _counts(line: Line, path: Path) -> bool:
    span = path.get(line.get("session", 0))
    return span is not None and span.has_row(line["step"])


def alert_files(store: Store) -> list[tuple[int, str]]:
    """(rank, key) of every rank's file. Others than of a log's own names are not read."""
    matches = [_FILE.fullmatch(name) for name in files.names(store, "alerts")]
    return [(int(match[1]), f"alerts/{match[0]}") for match in matches if match]


def all_lines(store: Store) -> dict[int, list[Line]]:
    """Rank → its lines, the ends included."""
    return {rank: read_rank(store, key) for rank, key in alert_files(store)}
