"""Where a log lives: a folder, a URL, or any zarr Store. Small files travel the same way."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
import shutil
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from zarr.abc.store import Store
from zarr.buffer import cpu, default_buffer_prototype
from zarr.storage import FsspecStore, LocalStore

from diffhook.compat.zarr import sync
from diffhook.errors import LogError
from diffhook.log.durable import DurableStore, is_partial

T = TypeVar("T")
Location = str | os.PathLike[str] | Store

_writing = threading.local()  # .tell: called after each write of this thread

_S3: dict[str, Any] = {
    "use_listings_cache": False,  # what another process wrote since must be seen
    "max_concurrency": 1,  # with more, every read asks for the object's size first
    "config_kwargs": {"connect_timeout": 10, "read_timeout": 20},  # an answer that is lost is asked for again
}
_FOR_GOOD = (errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG)
_LONGEST_REQUEST = 120.0  # seconds, with what a client tries again
_SLOWEST = 1 << 20  # bytes/s, which a large file has besides
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def open_store(location: Location, *, read_only: bool) -> Store:
    """The store behind a folder's path, an fsspec URL ("s3://bucket/run") or a Store.

    Raises:
        LogError: nothing is there, or nothing that could be a log.
    """
    path = folder_of(location)
    if path is None:
        return location if isinstance(location, Store) else _open_url(str(location), read_only)
    if path.exists() and not path.is_dir():
        raise LogError(f"{path} is a file; a log is a folder")
    if read_only and not path.exists():
        raise LogError(f"no log at {path}: the folder does not exist")
    if not read_only:
        _refuse_links(path)
    return DurableStore(path, read_only=read_only)


def folder_of(location: Location) -> Path | None:
    """The folder that a path, a file:// URL or zarr's LocalStore names; None for other stores."""
    if type(location) is LocalStore:
        return location.root
    if isinstance(location, Store):
        return None
    path = str(location).removeprefix("file://")
    return None if "://" in path else Path(path).expanduser()


def _open_url(url: str, read_only: bool) -> Store:
    options = _S3 if url.startswith("s3://") else None
    try:
        return FsspecStore.from_url(url, storage_options=options, read_only=read_only)
    except (ImportError, ValueError) as error:
        raise LogError(f"cannot open {url}: {error}") from error


def _refuse_links(path: Path) -> None:
    """A log from elsewhere may hold a link that leads our writes out of it."""
    for folder, folders, others in os.walk(path):
        for name in [*folders, *others]:
            if os.path.islink(os.path.join(folder, name)):
                raise LogError(
                    f"{os.path.join(folder, name)} is a symbolic link; a log that is written to has none"
                )


def settled(location: Location) -> Location:
    """The location, whatever becomes of the working directory."""
    if isinstance(location, Store) or "://" in str(location):
        return location
    return os.path.abspath(os.path.expanduser(location))


def describe(store: Store) -> str:
    """The location in words, for messages."""
    return str(store.root) if isinstance(store, LocalStore) else str(store)


def is_folder(store: Store) -> bool:
    """Whether the log lies in a folder, whose errors are the disk's, not a network's."""
    return isinstance(store, LocalStore)


def free_bytes(store: Store) -> int | None:
    """What the disk of a folder still takes; None where it is a network, or cannot be known."""
    if isinstance(store, LocalStore):
        with contextlib.suppress(OSError):
            return shutil.disk_usage(store.root).free
    return None


def is_name(name: str) -> bool:
    """Whether it is safe as one component of a key."""
    return _NAME.fullmatch(name) is not None and ".." not in name


def check_name(name: str) -> str:
    """Raises LogError unless :func:`is_name` holds."""
    if not is_name(name):
        raise LogError(
            f"{name!r} cannot name a part of a log; expected letters, digits, '.', '_' and '-', "
            "beginning with a letter or digit, 100 at most"
        )
    return name


@contextlib.contextmanager
def refusals(store: Store) -> Iterator[None]:
    """What waiting does not mend becomes a LogError; a full disk or a network stays what it is."""
    try:
        yield
    except OSError as error:
        if isinstance(error, PermissionError | FileNotFoundError) or error.errno in _FOR_GOOD:
            raise LogError(
                f"cannot write a log at {describe(store)}: {error}. Make it writable, or use another place "
                "or a copy of it"
            ) from error
        raise


def put(store: Store, key: str, content: bytes) -> None:
    """Publish a small file whole, after everything that was set before it."""
    set_uncommitted(store, key, content)
    commit(store)


def put_parts(store: Store, key: str, parts: Iterable[bytes | memoryview]) -> None:
    """Publish a large file, likewise. In a folder, one part at a time is held in memory."""
    if isinstance(store, DurableStore):
        store.write(key, _told(parts))
    else:
        set_uncommitted(store, key, *parts)
    commit(store)


def _told(parts: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    for part in parts:
        yield part
        _tell_write()


def commit(store: Store) -> None:
    """Publish what was set, where the store keeps it back until then."""
    if hasattr(store, "commit"):  # a DurableStore, or one of icechunk
        store.commit()
        _tell_write()


def tell_writes(to: Callable[[], None]) -> None:
    """Have ``to`` called after everything that this thread writes from now on."""
    _writing.tell = to


def _tell_write() -> None:
    tell = getattr(_writing, "tell", None)
    if tell is not None:
        tell()


def failed_commits(store: Store) -> int:
    """How often :func:`commit` failed. After it, what was set before wants to be set again."""
    found: int = getattr(store, "failed_commits", 0)
    return found


def set_uncommitted(store: Store, key: str, *parts: bytes | memoryview) -> None:
    """Write a file, in parts that follow each other. :func:`commit` publishes it, in stores that wait."""
    if isinstance(store, DurableStore):
        store.write(key, parts)
    else:
        content = b"".join(parts)
        _ask(store.set(key, cpu.Buffer.from_bytes(content)), len(content))
    _tell_write()


def get(store: Store, key: str) -> bytes | None:
    """A file's content, or None where there is none."""
    if isinstance(store, DurableStore):
        return store.read(key)
    found = _ask(store.get(key, prototype=default_buffer_prototype()))
    return None if found is None else found.to_bytes()


def exists(store: Store, key: str) -> bool:
    return bool(_ask(store.exists(key)))


def names(store: Store, prefix: str) -> Iterator[str]:
    """Sorted names of the entries directly below ``prefix``."""
    found = store.names(prefix) if isinstance(store, DurableStore) else _collect(store.list_dir(prefix))
    yield from sorted({name.rstrip("/") for name in found} - {""})


def keys(store: Store, prefix: str) -> Iterator[str]:
    """Sorted keys of all files below ``prefix``."""
    if isinstance(store, DurableStore):
        yield from sorted(store.keys(prefix))
    else:
        yield from sorted(_collect(store.list_prefix(f"{prefix}/" if prefix else "")))


def _ask(request: Coroutine[Any, Any, T], size: int = 0) -> T:
    """The answer to a request, which is given up where none comes: clients of networks, which try again by
    themselves, now and then wait for ever.

    Args:
        size: bytes that travel.

    Raises:
        TimeoutError: none came.
    """
    limit = _LONGEST_REQUEST + size / _SLOWEST

    async def limited() -> T:
        return await asyncio.wait_for(request, limit)

    try:
        return sync(limited())
    except TimeoutError as error:
        raise TimeoutError(str(error) or f"no answer within {limit:.3g} s") from error


def size(store: Store, key: str) -> int:
    """Bytes of a file."""
    return int(_ask(store.getsize(key)))


def _collect(entries: AsyncIterator[str]) -> list[str]:
    async def collect() -> list[str]:
        return [name async for name in entries if not is_partial(name.rpartition("/")[2])]

    try:
        return _ask(collect())
    except FileNotFoundError:
        return []


def remove(store: Store, key: str) -> None:
    """Remove one file, if it is there."""
    _ask(store.delete(key))


def move(store: Store, key: str, to: str) -> None:
    """Give a file another key. Where there is none, nothing happens. :func:`commit` makes it last."""
    if isinstance(store, DurableStore):
        store.rename(key, to)
        return
    content = get(store, key)
    if content is not None:
        put(store, to, content)
        _ask(store.delete(key))


def clean(store: Store, prefix: str, *, only: str = "", older_than: float = 0.0) -> None:
    """Remove what a killed process left of its writes below ``prefix``.

    Args:
        only: how the file's name begins.
        older_than: seconds; for places where another process may be at work.
    """
    if not isinstance(store, LocalStore):
        return  # an object store publishes a key at once or not at all
    folder = store.root / prefix
    pattern = f"{only}*.partial"
    found = folder.rglob(pattern) if prefix else folder.glob(pattern)
    for path in found:
        with contextlib.suppress(FileNotFoundError):
            if is_partial(path.name) and time.time() - path.stat().st_mtime >= older_than:
                path.unlink()
