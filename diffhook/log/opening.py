"""Where a run may write: what it will do to what lies there, and to whom the place belongs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from zarr.abc.store import Store

from diffhook.errors import LogError
from diffhook.log import store as files
from diffhook.log.grid import read_grid
from diffhook.log.index import LINKED, LogIndex
from diffhook.log.lineage import Path, Session, path_to
from diffhook.log.lock import ROOT as LOCKS
from diffhook.log.lock import rank_lock
from diffhook.log.rank import RankGroup
from diffhook.log.root import find_config
from diffhook.log.schema import differences, json_like

_PARTS = {"train", "probe", "queries", "snapshots", "alerts", "thumbnails", "quarantine", "names", LOCKS}
_BY_RANK = ("alerts", "thumbnails", "names")  # with files of each rank


def config_there(store: Store, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The configuration of the log that is there, which this one may continue; None where there is none.

    Raises:
        LogError: something else is there, or a log of another configuration or dataset.
    """
    found, foreign = find_config(store), []
    if found is None:
        foreign = [name for name in files.names(store, "") if not (name in _PARTS or _is_litter(name))]
        found = find_config(store) if foreign else None  # another process may have begun it meanwhile
    if found is not None:
        own = json_like(config)
        known, new = found["identity"], own["identity"]
        there = found.get("probe") or {"grid": read_grid(store, found)}
        if "probe" in own and there.get("grid") is not None:  # all of one grid: queries share their noise
            known, new = {**known, "probe": there}, {**new, "probe": own["probe"]}
        _check_same(known, new, files.describe(store))
        return found
    if foreign:
        raise LogError(
            f"{files.describe(store)} is not empty and holds no diffhook log (it has {foreign[0]!r}): choose "
            "another path"
        )
    return None


def _is_litter(name: str) -> bool:
    """What desktops, notebooks and file systems put into every folder."""
    return name.startswith(".") or name in ("lost+found", "desktop.ini", "Thumbs.db")


def _check_same(found: Mapping[str, Any], own: Mapping[str, Any], where: str) -> None:
    if found.get("dataset") is None or own.get("dataset") is None:
        # A loop that names its samples tells of no dataset.
        found, own = {**found, "dataset": None}, {**own, "dataset": None}
    differing = list(differences(found, own))
    if differing:
        more = f" (and {len(differing) - 5} more)" if len(differing) > 5 else ""
        what = "another dataset" if differing[0].startswith("dataset") else "another configuration"
        raise LogError(
            f"the log at {where} belongs to {what}: {'; '.join(differing[:5])}{more}. "
            "Choose another path, or restore the configuration to continue this one"
        )


def clean(store: Store, rank: int) -> None:
    """Remove what an earlier process of this rank was killed in the middle of writing."""
    files.clean(store, "", older_than=60.0)  # other ranks begin at the same time
    if rank == 0:
        files.clean(store, "snapshots")
    for part in _BY_RANK:
        files.clean(store, part, only=f"rank-{rank:04d}")
    for table in LINKED:
        files.clean(store, f"{table}/rank-{rank:04d}")


def clean_gone(store: Store, processes: int) -> None:
    """The same for the ranks that a run of fewer processes does not have any more."""
    for rank in LogIndex(store).groups("train"):
        if rank >= processes:
            with suppress(LogError), rank_lock(store, rank):  # an error: it is being written, after all
                clean(store, rank)


def superseding(store: Store, sessions: Sequence[Session], new: Session) -> str:
    """What a run will do to the rows that are there, as a sentence; "" where there are none.

    Args:
        sessions: those that the log has.
        new: the one that begins with the run's first row.
    """
    before, after = path_to(sessions), path_to([*sessions, new])
    index = LogIndex(store)
    rows = superseded = 0
    samples: set[int] = set()
    for group in (g for g in index.groups("train").values() if g.columns):
        counts, stays = (_counting(group, path) for path in (before, after))
        rows += int(counts.sum())
        superseded += int((counts & ~stays).sum())
        samples.update(np.unique(group.read("sample", 0, group.committed)[counts]).tolist())
    if not rows:
        return ""
    held = f"{rows:,} rows of an earlier run of {len(samples):,} samples"
    if not superseded:
        return f"the log holds {held}; this run goes on after them, from step {new.start_step:,}"
    which = "they are" if superseded == rows else f"{superseded:,} of them are"
    return (
        f"the log holds {held}; {which} superseded from step {new.start_step:,} on, once the first new row "
        f"is written, and kept: open_log(path, session={len(sessions) - 1}) reads them"
    )


def _counting(group: RankGroup, path: Path) -> Any:
    return RankGroup(group.store, group.path, lambda: path).valid
