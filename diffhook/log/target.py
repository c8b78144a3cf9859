"""Where a copy of a log appears: all at once, or not at all."""

from __future__ import annotations

import glob
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from zarr.abc.store import Store

from diffhook.errors import LogError
from diffhook.log import store as files
from diffhook.log.lock import ROOT as LOCKS
from diffhook.log.lock import rank_lock
from diffhook.log.store import Location


@contextmanager
def new_store(target: Location) -> Iterator[Store]:
    """A store that appears at ``target`` when all is written, or not at all."""
    path = files.folder_of(target)
    if path is None:
        store = files.open_store(target, read_only=False)
        if list(files.names(store, "")):
            raise LogError(f"{files.describe(store)} is not empty: choose another place for the copy")
        yield store  # no log before its root is written
        return
    if path.exists():
        raise LogError(f"{path} exists: choose another place for the copy")
    _clear_killed(path)
    beside = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.unfinished")
    store = files.open_store(beside, read_only=False)
    with rank_lock(store, 0):
        try:
            yield store
            shutil.rmtree(beside / LOCKS, ignore_errors=True)
            beside.rename(path)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise


def _clear_killed(path: Path) -> None:
    """Remove what copies to ``path`` left that were killed; not one that is at work."""
    for beside in path.parent.glob(f"{glob.escape(path.name)}.{'[0-9a-f]' * 8}.unfinished"):
        with suppress(LogError), rank_lock(files.open_store(beside, read_only=False), 0):
            shutil.rmtree(beside, ignore_errors=True)
