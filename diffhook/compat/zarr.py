"""zarr's. Its stores are written in coroutines, and the types of what they return have no public home."""

from __future__ import annotations

from zarr.abc.store import Store
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
from zarr.core.sync import sync

__all__ = ["Buffer", "BufferPrototype", "check_writable", "default_buffer_prototype", "sync"]


def check_writable(store: Store) -> None:
    """Raises ValueError if the store was opened for reading, as zarr's own writing methods do."""
    store._check_writable()
