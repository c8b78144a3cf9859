"""One live writer for each rank of a log in a folder. The lock dies with the process that holds it."""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import Any

from zarr.abc.store import Store
from zarr.storage import LocalStore

from diffhook.errors import LogError

try:
    import fcntl
except ImportError:  # Windows: two writers there are not told apart
    fcntl = None  # type: ignore[assignment]

ROOT = "locks"

# path → handle, and who claims it; closing another handle of the file would let go of the lock
_held: dict[str, tuple[int, weakref.ref[Any]]] = {}


def lock_rank(store: Store, rank: int, owner: Any) -> None:
    """Claim a rank's tables until :func:`release_rank`, the end of the process, or that of ``owner``.

    Object stores, and file systems without locks, are not guarded.

    Raises:
        LogError: another process, or another owner in this one, writes there.
    """
    if fcntl is None or not isinstance(store, LocalStore):
        return
    path = _path(store, rank)
    if str(path) in _held:
        handle, earlier = _held[str(path)]
        if earlier() not in (None, owner):
            raise LogError(
                f"this process is writing rank {rank} of the log at {store.root} already: close the earlier "
                "hook or writer, or choose another path"
            )
        _held[str(path)] = handle, weakref.ref(owner)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        # Not flock: a forked DataLoader worker would hold that lock too, and outlive its parent.
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        writer = os.read(handle, 20).decode(errors="replace").strip()
        os.close(handle)
        raise LogError(
            f"process {writer or 'unknown'} is writing rank {rank} of the log at {store.root}: wait for it "
            "or end it, or choose another path"
        ) from error
    except OSError:  # no locks here
        os.close(handle)
        return
    os.ftruncate(handle, 0)
    os.write(handle, str(os.getpid()).encode())
    _held[str(path)] = handle, weakref.ref(owner)


def release_rank(store: Store, rank: int, owner: Any) -> None:
    """Let others write there. Nothing happens where the owner claims nothing."""
    path = str(_path(store, rank)) if isinstance(store, LocalStore) else ""
    handle, claimant = _held.get(path, (None, None))
    if handle is not None and claimant is not None and claimant() is owner:
        del _held[path]
        os.close(handle)


def _path(store: LocalStore, rank: int) -> Path:
    return (store.root / ROOT / f"rank-{rank:04d}").resolve()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_held.clear)  # a child holds no lock of its parent's
