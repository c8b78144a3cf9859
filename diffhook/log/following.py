"""A run that trains, looked at again and again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping

from diffhook.log.alerts import END, Line, all_lines
from diffhook.log.reader import RunLog


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
    for found in follow(log, interval, stopped):
        new = [line for rank, lines in found.items() for line in lines[read.get(rank, 0) :]]
        read = {rank: len(lines) for rank, lines in found.items()}
        yield sorted((n for n in new if n.get("kind") != END), key=lambda n: (n.get("time", 0.0), n["step"]))


def follow(
    log: RunLog, interval: float = 1.0, stopped: Callable[[], bool] = lambda: False
) -> Iterator[dict[int, list[Line]]]:
    """The log refreshed at each look, until the last session of every rank has ended.

    Arguments are those of :func:`follow_alerts`.

    Yields:
        Rank → all lines of its alerts, read before the log was refreshed: the last look sees every row.
    """
    while True:
        found = all_lines(log.store)
        log.refresh()
        yield found
        if _have_ended(found, log):
            return
        for _ in range(10):
            if stopped():
                return
            time.sleep(interval / 10)


def _have_ended(lines: Mapping[int, list[Line]], log: RunLog) -> bool:
    """Whether every process of the live session has said its end; those of earlier ones may be gone."""
    live = len(log.sessions) - 1
    last = {rank: own[-1] for rank, own in lines.items() if own}
    ended = {rank for rank, line in last.items() if line.get("kind") == END and line["session"] >= live}
    return bool(ended) and ended >= log.live_ranks
