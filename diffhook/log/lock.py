"""One live writer for each part of a log in a folder. The lock dies with the process that holds it."""

from __future__ import annotations

import os
import stat
import struct
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zarr.abc.store import Store
from zarr.storage import LocalStore

from diffhook.errors import LogBusyError, LogError

try:
    import fcntl
except ImportError:  # Windows: two writers there are not told apart
    fcntl = None  # type: ignore[assignment]

ROOT = "locks"

_held: dict[str, tuple[int, weakref.ref[Any]]] = {}  # path → handle, and who claims it


def lock_rank(store: Store, rank: int, owner: Any) -> None:
    """Claim a rank's tables until :func:`release_rank`, the end of the process, or that of ``owner``.

    Object stores, and file systems without locks, are not guarded.

    Raises:
        LogBusyError: another process, or another owner in this one, writes there.
    """
    close = "close the earlier hook or writer"
    _claim(store, _rank(rank), owner, f"rank {rank}", "choose another path", close)


def release_rank(store: Store, rank: int, owner: Any) -> None:
    """Let others write there. Nothing happens where the owner claims nothing."""
    _release(store, _rank(rank), owner)


@contextmanager
def rank_lock(store: Store, rank: int) -> Iterator[None]:
    """Claim a rank's tables for the time of a ``with`` block, as :func:`lock_rank` does."""
    owner = _Owner()
    lock_rank(store, rank, owner)
    try:
        yield
    finally:
        release_rank(store, rank, owner)


@contextmanager
def query_lock(store: Store, name: str) -> Iterator[None]:
    """Claim a query set while it is computed: two of one name at once would write over each other.

    Raises:
        LogBusyError: it is being computed already.
    """
    with part_lock(store, f"query-{name}", f"queries {name!r}", "choose another name"):
        yield


@contextmanager
def part_lock(store: Store, name: str, what: str, choose: str = "choose another path") -> Iterator[None]:
    """Claim a part of the work on a log.

    Raises:
        LogBusyError: somebody else has it.
    """
    owner = _Owner()
    _claim(store, name, owner, what, choose, "wait for it")
    try:
        yield
    finally:
        _release(store, name, owner)


def rows_in_memory(store: Store) -> int:
    """Rows of runs in this process that a reader of the log does not see yet."""
    return sum(getattr(writer, "rows_in_memory", 0) for writer in writers(store))


def writers(store: Store) -> list[Any]:
    """Those that write the log in this process."""
    if not isinstance(store, LocalStore):
        return []
    folder = (store.root / ROOT).resolve()
    mine = (owner() for path, (_, owner) in _held.items() if Path(path).parent == folder)
    return [owner for owner in mine if owner is not None]


class _Owner:
    """Of a lock that belongs to nothing else."""


def _rank(rank: int) -> str:
    return f"rank-{rank:04d}"


def _claim(store: Store, name: str, owner: Any, what: str, choose: str, close: str) -> None:
    if fcntl is None or not isinstance(store, LocalStore):
        return
    path = (store.root / ROOT / name).resolve()
    where = f"{what} of the log at {store.root}"
    if str(path) in _held:
        handle, earlier = _held[str(path)]
        if earlier() not in (None, owner):
            raise LogBusyError(f"this process is writing {where} already: {close}, or {choose}")
        _held[str(path)] = handle, weakref.ref(owner)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = _open(path)
    try:
        _lock(handle)
    except (BlockingIOError, PermissionError) as error:
        writer = os.read(handle, 20).decode(errors="replace").strip()
        os.close(handle)
        known = writer if writer.isdecimal() else "unknown"
        message = f"process {known} is writing {where}: wait for it or end it, or {choose}"
        raise LogBusyError(message) from error
    except OSError:  # no locks here
        os.close(handle)
        return
    os.ftruncate(handle, 0)
    os.write(handle, str(os.getpid()).encode())
    _held[str(path)] = handle, weakref.ref(owner)


def _release(store: Store, name: str, owner: Any) -> None:
    path = str((store.root / ROOT / name).resolve()) if isinstance(store, LocalStore) else ""
    handle, claimant = _held.get(path, (None, None))
    if handle is not None and claimant is not None and claimant() is owner:
        del _held[path]
        os.close(handle)


def _open(path: Path) -> int:
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise LogError(f"{path} is no regular file: a log has no others")
    return handle


def _lock(handle: int) -> None:
    """Of the open file, not of the process: a POSIX lock would go when anything in the process, such as a
    copy of the log, closes the same file.

    Raises:
        OSError: somebody else has it, or the file system has no locks.
    """
    if hasattr(fcntl, "F_OFD_SETLK"):
        whole_file = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        fcntl.fcntl(handle, fcntl.F_OFD_SETLK, whole_file)
    else:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _forget_in_child() -> None:
    """A child has its parent's open files: a worker that outlives the run would go on holding the lock."""
    for handle, _ in _held.values():
        os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
