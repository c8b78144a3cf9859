"""Where a log lives: a folder, a URL, or any zarr Store. Small files travel the same way."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Iterator
from pathlib import Path

from zarr.abc.store import Store
from zarr.buffer import cpu, default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import FsspecStore, LocalStore

from diffhook.errors import LogError

Location = str | os.PathLike[str] | Store

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def open_store(location: Location, *, read_only: bool) -> Store:
    """The store behind a folder's path, an fsspec URL ("s3://bucket/run") or a Store."""
    if isinstance(location, Store):
        return location
    if isinstance(location, str) and location.startswith("file://"):
        location = location.removeprefix("file://")
    if isinstance(location, str) and "://" in location:
        try:
            return FsspecStore.from_url(location, read_only=read_only)
        except (ImportError, ValueError) as error:
            raise LogError(f"cannot open {location}: {error}") from error
    path = Path(location)
    if path.exists() and not path.is_dir():
        raise LogError(f"{path} is a file; a log is a folder")
    if read_only and not path.exists():
        raise LogError(f"no log at {path}: the folder does not exist")
    return LocalStore(path, read_only=read_only)


def describe(store: Store) -> str:
    """The location in words, for messages."""
    return str(store.root) if isinstance(store, LocalStore) else str(store)


def check_name(name: str) -> str:
    """Raises LogError unless ``name`` is safe as one component of a key."""
    if not _NAME.fullmatch(name) or ".." in name:
        raise LogError(
            f"{name!r} cannot name a part of a log; expected letters, digits, '.', '_' and '-', "
            "beginning with a letter or digit, 100 at most"
        )
    return name


def put(store: Store, key: str, content: bytes) -> None:
    """Publish a small file whole (local stores: temporary name, then rename)."""
    sync(store.set(key, cpu.Buffer.from_bytes(content)))


def get(store: Store, key: str) -> bytes | None:
    """A file's content, or None where there is none."""
    found = sync(store.get(key, prototype=default_buffer_prototype()))
    return None if found is None else found.to_bytes()


def names(store: Store, prefix: str) -> Iterator[str]:
    """Sorted names of the entries directly below ``prefix``."""

    async def collect() -> list[str]:
        return [name async for name in store.list_dir(prefix)]

    try:
        yield from sorted(name.rstrip("/") for name in sync(collect()))
    except (FileNotFoundError, asyncio.CancelledError):
        return


def delete(store: Store, prefix: str) -> None:
    """Remove everything below ``prefix``."""
    sync(store.delete_dir(prefix))
