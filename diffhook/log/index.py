"""What a log holds, each part read once: a look at one moment, however long one works with it."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from itertools import pairwise

from zarr.abc.store import Store

from diffhook.errors import LogError
from diffhook.log import store as files
from diffhook.log.lineage import Path, Session, longest, path_to
from diffhook.log.rank import RankGroup
from diffhook.log.samples import read_names
from diffhook.log.snapshots import ROOT as SNAPSHOTS
from diffhook.log.snapshots import Snapshot, read_snapshots
from diffhook.log.table import Table
from diffhook.log.thumbnails import Thumbnails
from diffhook.words import at_steps

logger = logging.getLogger("diffhook")

_RANK = re.compile(r"rank-(\d{4,6})")
_MOST_PROCESSES = 4096  # that are looked for where a listing lacks them
LINKED = ("train", "probe")
"""Tables whose rows are of sessions; those of a query set all count."""


class LogIndex:
    """The tables, sessions and snapshots of a log. Nothing is read before it is asked for, or twice.

    Args:
        session: whose path counts; None: the live one's.
        sessions: in place of those that are in the log, with one that is about to begin.

    Raises:
        LogError: from any attribute or method: something is damaged; the message names the file.
    """

    def __init__(
        self, store: Store, session: int | None = None, sessions: Sequence[Session] | None = None
    ) -> None:
        self.store = store
        self._session = session
        if sessions is not None:
            self.sessions = tuple(sessions)
        self._groups: dict[str, dict[int, RankGroup]] = {}
        self._tables: dict[str, Table] = {}

    def groups(self, table: str) -> dict[int, RankGroup]:
        """Rank → its group of a table."""
        if table not in self._groups:
            matches = [_RANK.fullmatch(name) for name in files.names(self.store, table)]
            found = {int(m[1]): self._group(table, m[0]) for m in matches if m}
            if table in LINKED and not files.is_folder(self.store):
                self._add_unlisted(table, found)
            self._groups[table] = dict(sorted(found.items()))
        return self._groups[table]

    def _group(self, table: str, name: str) -> RankGroup:
        return RankGroup(self.store, f"{table}/{name}", (lambda: self.path) if table in LINKED else None)

    def _add_unlisted(self, table: str, found: dict[int, RankGroup]) -> None:
        """A network's listing may come short, and a rank that is not seen is lost, or written over."""
        self._look_for(table, 0, found)  # takes part in every session
        if table == "train":
            for rank in range(min(max(map(_processes, found.values()), default=0), _MOST_PROCESSES)):
                self._look_for(table, rank, found)

    def _look_for(self, table: str, rank: int, found: dict[int, RankGroup]) -> None:
        if rank not in found and files.exists(self.store, f"{table}/rank-{rank:04d}/zarr.json"):
            found[rank] = self._group(table, f"rank-{rank:04d}")

    def table(self, name: str) -> Table:
        if name not in self._tables:
            self._tables[name] = Table(name, list(self.groups(name).values()))
        return self._tables[name]

    @cached_property
    def sessions(self) -> tuple[Session, ...]:
        """Every start of a run that has left something in the log."""
        return longest(group.history for table in LINKED for group in self.groups(table).values())

    def history(self, rank: int) -> tuple[Session, ...]:
        """The sessions as one rank knows them, up to the last one that it took part in."""
        group = self.groups("train").get(rank)
        return () if group is None else group.history

    @cached_property
    def path(self) -> Path:
        """Which rows, snapshots and alerts count."""
        return path_to(self.sessions, self._session)

    @cached_property
    def session_rows(self) -> list[int]:
        """How many training rows each session has written, on the path or not."""
        rows = [0] * len(self.sessions)
        for group in self.groups("train").values():
            edges = [*(session["first_row"] for session in group.sessions), group.marked]
            for number, (start, stop) in enumerate(pairwise(edges)):
                rows[number] += max(stop - start, 0)
        return rows

    @cached_property
    def all_snapshots(self) -> list[Snapshot]:
        """Those that can be read, of every session, by step."""
        return read_snapshots(self.store, self.expected_snapshots)

    @cached_property
    def snapshots(self) -> list[Snapshot]:
        """Those that count, by step. Tells of those that are missing: scores weigh by what is there."""
        if self.missing_snapshots:
            logger.warning(
                "%s: snapshots that the run wrote are missing (%s). Queries at these steps are not "
                "available, and scores use the remaining snapshots. Restore %s/, or have "
                "`diffhook verify --repair` note the loss",
                files.describe(self.store), at_steps(self.missing_snapshots), SNAPSHOTS,
            )  # fmt: skip
        return [s for s in self.all_snapshots if self._counts(s.step, s.session)]

    @cached_property
    def missing_snapshots(self) -> list[int]:
        """Steps of those that would count, were written, and are not there."""
        there = {(s.step, s.session) for s in self.all_snapshots}
        return sorted(at[0] for at in self.expected_snapshots - there if self._counts(*at))

    @cached_property
    def expected_snapshots(self) -> set[tuple[int, int]]:
        """(step, session) of all that were written, but for those whose loss a repair has noted."""
        return self._recorded("snapshots") - self.lost_snapshots

    @cached_property
    def lost_snapshots(self) -> set[tuple[int, int]]:
        """(step, session) of those whose loss a repair has noted."""
        return self._recorded("lost_snapshots")

    def _recorded(self, key: str) -> set[tuple[int, int]]:
        """(step, session) of what the marks say of snapshots; a mark that is damaged says nothing."""
        found: set[tuple[int, int]] = set()
        for group in self.groups("train").values():
            with suppress(LogError):
                for number, session in enumerate(group.sessions):
                    found.update((step, number) for step in session.get(key, []))
        return found

    def _counts(self, step: int, session: int) -> bool:
        span = self.path.get(session)
        return span is not None and span.has_snapshot(step)

    @cached_property
    def query_names(self) -> list[str]:
        """Names of all query sets, finished or not. What else a desktop has put there is none."""
        return [n for n in files.names(self.store, "queries") if files.is_name(n) and n != "zarr.json"]

    @cached_property
    def queries(self) -> dict[str, Table]:
        """The query sets that count: finished ones, at snapshots that count, whether these are still there or
        not."""
        there = {(s.step, s.session) for s in self.snapshots}
        counting = there | {at for at in self._recorded("snapshots") if self._counts(*at)}
        tables = {name: self.table(f"queries/{name}") for name in self.query_names}
        return {name: table for name, table in tables.items() if snapshots_of(table) <= counting}

    @cached_property
    def names(self) -> dict[int, str]:
        """Sample id → name."""
        return read_names(self.store)

    @cached_property
    def thumbnails(self) -> Thumbnails:
        """Sample id → PNG."""
        return Thumbnails(self.store)


def _processes(group: RankGroup) -> int:
    """How many there were at most, as one of them says; 0 where its mark is damaged."""
    with suppress(LogError):
        return max((session.get("processes", 0) for session in group.sessions), default=0)
    return 0


def snapshots_of(table: Table) -> set[tuple[int, int]]:
    """The (step, session) of the snapshots of a query set; impossible ones where it is unfinished."""
    description = table.description
    at = description.get("snapshots") if isinstance(description, dict) else None
    if not isinstance(at, list):
        return {(-1, -1)}
    try:
        return {(int(step), int(session)) for step, session in at}
    except (TypeError, ValueError) as error:
        raise LogError(f"{table.name}: its description is damaged: {error}") from error
