"""Which rows count: those on the path of sessions that leads to the live one. Pure functions, no disk.

A session is one start of a run, of all its processes. It goes on from its parent at a step:

    session 0   0 ───────── 5 ───────── 15
    session 1               └─ 6            resumed from checkpoint 5: a wrong branch, which is kept
    session 2                            └───▶ live, resumed from checkpoint 15

The path to session 2 is session 0 up to step 15, then session 2. The newest session with a row is live.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from diffhook.errors import LogError

_FOREVER = 1 << 62


@dataclass(frozen=True)
class Session:
    """One start of a run.

    Attributes:
        id: what a checkpoint calls it. Numbers repeat in copies of a log that went different ways; ids don't.
        start_step: optimiser steps taken before it.
        parent: number of the session that it goes on from; None where it began anew.
    """

    id: str
    start_step: int
    parent: int | None = None


@dataclass(frozen=True)
class Span:
    """The steps of one session that are on a path.

    A training row's step is the number of steps taken before it; a snapshot's, and its probes', of those
    taken in all. So what was kept at the step of a checkpoint belongs to the session that wrote it.
    """

    after: int
    stop: int

    def has_row(self, step: int) -> bool:
        """Whether a training row, or an alert about one, counts."""
        return step < self.stop

    def has_snapshot(self, step: int) -> bool:
        """Whether a snapshot counts."""
        return self.after < step <= self.stop

    def rows(self, steps: npt.NDArray[Any], *, probes: bool) -> npt.NDArray[np.bool_]:
        """(rows,): which of the training's or the probes' rows count."""
        counts: npt.NDArray[np.bool_]
        counts = (steps > self.after) & (steps <= self.stop) if probes else steps < self.stop
        return counts

    @property
    def is_open(self) -> bool:
        """Whether no other session goes on from this one, on the path."""
        return self.stop == _FOREVER

    def is_whole(self, *, probes: bool) -> bool:
        """Whether every row counts, whatever its step."""
        return self.is_open and not (probes and self.after >= 0)


Path = Mapping[int, Span]
"""Number of a session → which of its steps count. Other sessions are of another branch."""


def path_to(sessions: Sequence[Session], number: int | None = None) -> Path:
    """The path that leads to a session, by default to the live one.

    Raises:
        LogError: no session has that number.
    """
    if number is None:
        number = len(sessions) - 1 if sessions else None
    elif type(number) is not int or not 0 <= number < len(sessions):
        raise LogError(f"there is no session {number!r}; the log has {len(sessions)}, counted from 0")
    spans: dict[int, Span] = {}
    stop = _FOREVER
    while number is not None:
        session = sessions[number]
        spans[number] = Span(session.start_step - (session.parent is None), stop)
        stop = min(stop, session.start_step)
        number = session.parent
    return spans


def longest(histories: Iterable[Sequence[Session]]) -> tuple[Session, ...]:
    """All sessions of a log. Each rank knows those that had begun when it last began one itself.

    Raises:
        LogError: two ranks contradict each other.
    """
    found: Sequence[Session] = ()
    for history in histories:
        known = min(len(found), len(history))
        if tuple(history[:known]) != tuple(found[:known]):
            raise LogError("the log is damaged: its ranks have different records of the same sessions")
        found = max(found, history, key=len)
    return tuple(found)


def continued(
    sessions: Sequence[Session],
    start_step: int,
    after: str | None = None,
    run: str | None = None,
    *,
    has_begun: bool = False,
) -> tuple[Session, ...]:
    """The sessions of a log with the one that begins now as the last one: another rank may have begun it.

    Args:
        start_step: optimiser steps taken before.
        after: id of the session that the run's checkpoint stands for; None: of the live one.
        run: the new session's id, on which its processes have agreed; None: they could not, and take what
            follows from the sessions before.
        has_begun: whether this rank has taken part in the last of the sessions.
    """
    if sessions and sessions[-1].id == run:
        return tuple(sessions)
    if sessions and run is None and not has_begun:
        *before, last = sessions
        if last == _next(before, start_step, after, run):
            return tuple(sessions)
    return (*sessions, _next(sessions, start_step, after, run))


def _next(sessions: Sequence[Session], start_step: int, after: str | None, run: str | None) -> Session:
    parent = None if start_step == 0 or not sessions else len(sessions) - 1
    if parent is not None and is_known(sessions, after):
        parent = [session.id for session in sessions].index(str(after))
    origin = "" if parent is None else sessions[parent].id
    derived = hashlib.sha256(f"{len(sessions)} {start_step} {origin}".encode()).hexdigest()[:16]
    return Session(run or derived, start_step, parent)


def is_known(sessions: Sequence[Session], session: str | None) -> bool:
    """Whether one of them has this id. A checkpoint of it may be from before its own first step, where the
    step is known to be another than the checkpoint says: the path then leads through its ancestors."""
    return any(known.id == session for known in sessions)
