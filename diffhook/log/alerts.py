"""Alerts of a run: JSON lines, one file for each rank.

A session that ends cleanly says so in a last line of each rank's file, {"kind": "end", …}.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from zarr.abc.store import Store

from diffhook.log import store as files

if TYPE_CHECKING:
    from diffhook.log.reader import RunLog

END = "end"

Line = dict[str, Any]


def key(rank: int) -> str:
    """Where a rank's alerts are."""
    return f"alerts/rank-{rank:04d}.jsonl"


def read_alerts(store: Store, session_starts: Sequence[int]) -> list[Line]:
    """Alerts of all ranks, by step; not those of steps that a later session took again."""
    counting = [
        line for lines in _lines(store).values() for line in lines
        if line["kind"] != END
        and line["step"] < min(session_starts[line.get("session", 0) + 1 :], default=line["step"] + 1)
    ]  # fmt: skip
    return sorted(counting, key=lambda line: line["step"])


def follow_alerts(log: RunLog, interval: float = 1.0) -> Iterator[list[Line]]:
    """New alerts of all ranks, in the order in which they were raised, as they come.

    Args:
        log: of a run that still trains, or has ended.
        interval: seconds between looks.

    Yields:
        What is new at each look, perhaps nothing. Ends when the last session of every rank has.
    """
    read: dict[str, int] = {}
    while True:
        found = _lines(log.store)
        new = [line for name, lines in found.items() for line in lines[read.get(name, 0) :]]
        read = {name: len(lines) for name, lines in found.items()}
        yield sorted((n for n in new if n["kind"] != END), key=lambda n: (n.get("time", 0.0), n["step"]))
        ends = [lines[-1] for lines in found.values() if lines and lines[-1]["kind"] == END]
        begun = len(log.session_starts()) - 1
        if len(ends) >= max(log.ranks, 1) and max(end["session"] for end in ends) >= begun:
            return
        time.sleep(interval)


def _lines(store: Store) -> dict[str, list[Line]]:
    """File → its lines."""
    return {
        name: [json.loads(line) for line in _text(store, name).splitlines() if line]
        for name in files.names(store, "alerts")
    }


def _text(store: Store, name: str) -> str:
    return (files.get(store, f"alerts/{name}") or b"").decode()
