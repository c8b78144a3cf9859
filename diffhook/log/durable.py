"""A folder whose writes survive a power cut."""

from __future__ import annotations

import errno
import os
import re
import stat
import uuid
from collections.abc import AsyncIterator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path
from typing import Any, Self

from zarr.abc.store import ByteRequest
from zarr.storage import LocalStore

from diffhook.compat.zarr import Buffer, BufferPrototype, check_writable
from diffhook.errors import LogError

_LARGE = 1 << 20  # bytes from which a file is brought to the disk while others are still being written
_PARTIAL = re.compile(r".*\.[0-9a-f]{32}\.partial")  # ours and zarr's own


def is_partial(name: str) -> bool:
    """Whether a file of this name is what a killed process left of a write."""
    return _PARTIAL.fullmatch(name) is not None


class DurableStore(LocalStore):
    """zarr's folder, with writes that are published together and outlive a power cut.

    Keys that are set lie under temporary names until :meth:`commit`, which brings all of them to the
    disk (fsync) before any gets its name. The one that was set last follows when the names of all the
    others are safe too: it can serve as their commit mark.

    Attributes:
        failed_commits: how often :meth:`commit` has failed. What was set before may then be lost although
            a later one succeeds: after a failed fsync the system takes what it could not write for clean.
    """

    def __init__(self, root: Path | str, *, read_only: bool = False) -> None:
        super().__init__(root, read_only=read_only)
        self.failed_commits = 0
        self._waiting: dict[str, Path] = {}
        self._changed: set[Path] = set()  # folders with entries that may not be on the disk
        self._syncing: dict[Path, Future[None]] = {}
        self._folders: set[Path] = set()  # known to be folders, and no links

    def with_read_only(self, read_only: bool = False) -> Self:
        other = super().with_read_only(read_only)
        other._waiting, other._changed, other._syncing = self._waiting, self._changed, self._syncing
        return other

    def commit(self) -> None:
        """Publish everything that was set.

        Raises:
            OSError: the disk failed; what was set may be set again.
        """
        try:
            self._commit()
        except BaseException:
            self.failed_commits += 1
            raise

    def _commit(self) -> None:
        syncing, self._syncing = self._syncing, {}
        _sync(path for path in self._waiting.values() if path not in syncing)
        for future in syncing.values():
            future.result()
        # At once: taking a name from an older file waits for the file system's journal.
        list(_pool().map(self._publish, list(self._waiting)[:-1]))
        self._sync_folders()
        if self._waiting:
            self._publish(next(iter(self._waiting)))
            self._sync_folders()

    def _publish(self, key: str) -> None:
        path = self.root / key
        self._waiting[key].replace(path)
        del self._waiting[key]
        self._changed.add(path.parent)

    def _sync_folders(self) -> None:
        if os.name == "posix":  # elsewhere a folder cannot be opened
            _sync(self._changed)
        self._changed.clear()

    def write(self, key: str, parts: Iterable[bytes | memoryview]) -> None:
        """Set a key to the parts, one after the other, which are not copied and may be made on the way."""
        check_writable(self)
        path = self.root / key
        self._make(path.parent)
        partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
        try:
            with partial.open("wb") as file:
                file.writelines(parts)
                size = file.tell()
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        self._forget(key)
        self._waiting[key] = partial
        if size >= _LARGE:
            self._syncing[partial] = _pool().submit(_sync_one, partial)

    def rename(self, key: str, to: str) -> None:
        """Give a file another key, which survives a power cut after the next :meth:`commit`."""
        check_writable(self)
        path, target = self._file(key), self.root / to
        if path is not None:
            self._make(target.parent)
            path.replace(target)
            self._changed |= {path.parent, target.parent}

    def _make(self, folder: Path) -> None:
        if not folder.exists():
            if folder == self.root:  # which is made when its writer claims it
                raise FileNotFoundError(errno.ENOENT, "the log's folder is gone", str(folder))
            self._make(folder.parent)
            folder.mkdir(exist_ok=True)
            self._changed.add(folder.parent)
        elif not self._is_folder(folder):
            raise NotADirectoryError(folder)

    def _forget(self, key: str) -> None:
        partial = self._waiting.pop(key, None)
        if partial is not None:
            future = self._syncing.pop(partial, None)
            if future is not None:
                wait([future])
            partial.unlink(missing_ok=True)

    # ── zarr's interface ──────────────────────────────────────────────────────────────────────

    async def set(self, key: str, value: Buffer) -> None:
        self.set_sync(key, value)

    def set_sync(self, key: str, value: Buffer) -> None:
        self.write(key, [memoryview(value.as_buffer_like())])

    async def get(
        self,
        key: str,
        prototype: BufferPrototype | None = None,
        byte_range: ByteRequest | None = None,
    ) -> Buffer | None:
        path = self._file(key)
        return None if path is None else await super().get(self._key(path), prototype, byte_range)

    def get_sync(self, key: str, **options: Any) -> Buffer | None:
        path = self._file(key)
        return None if path is None else super().get_sync(self._key(path), **options)

    async def exists(self, key: str) -> bool:
        return self._file(key) is not None

    async def getsize(self, key: str) -> int:
        path = self._file(key)
        if path is None:
            raise FileNotFoundError(key)
        return path.stat().st_size

    async def delete(self, key: str) -> None:
        self._forget(key)
        await super().delete(key)

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        for name in self.names(prefix):
            yield name

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        for key in self.keys(prefix.rstrip("/")):
            yield key

    # ── reading ───────────────────────────────────────────────────────────────────────────────

    def read(self, key: str) -> bytes | None:
        """A file's content; None where there is none.

        Raises:
            LogError: it is a link, a pipe or a device, or lies behind a link. A log may come from anywhere:
                what it points to is not a part of it, and a pipe may never end.
        """
        path = self._file(key)
        try:
            return None if path is None else path.read_bytes()
        except FileNotFoundError:  # replaced or removed meanwhile
            return None

    def names(self, prefix: str) -> list[str]:
        """Names directly below ``prefix``, in no order."""
        folder = self.root / prefix
        try:
            found = os.listdir(folder) if self._is_folder(folder) else []
        except FileNotFoundError:  # removed meanwhile
            found = []
        if not found and self.read_only and not self.root.exists():
            raise LogError(f"no log at {self.root}: the folder is gone")
        return [name for name in found if not is_partial(name)]

    def keys(self, prefix: str) -> Iterator[str]:
        """Keys of all files below ``prefix``, links and others that cannot be read included."""
        if not self._is_folder(self.root / prefix):
            return
        for folder, folders, others in os.walk(self.root / prefix, onerror=_unless_removed):
            links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
            place = self._key(Path(folder))
            for name in [*others, *links]:
                if not is_partial(name):
                    yield name if place == "." else f"{place}/{name}"

    def _key(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def _file(self, key: str) -> Path | None:
        path = self._waiting.get(key) or self.root / key
        mode = self._mode(path) if self._is_folder(path.parent) else None
        if mode is None or stat.S_ISDIR(mode):
            return None
        if not stat.S_ISREG(mode):
            raise self._foreign(path)
        return path

    def _is_folder(self, folder: Path) -> bool:
        """Whether there is such a folder in the log, reached through no link."""
        if folder == self.root or folder in self._folders:
            return True
        if self.root not in folder.parents:
            raise LogError(f"{folder} is not in the log at {self.root}")
        mode = self._mode(folder) if self._is_folder(folder.parent) else None
        if mode is not None and stat.S_ISLNK(mode):
            raise self._foreign(folder)
        if mode is None or not stat.S_ISDIR(mode):
            return False
        self._folders.add(folder)
        return True

    def _mode(self, path: Path) -> int | None:
        try:
            return path.lstat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _foreign(self, path: Path) -> LogError:
        return LogError(f"{path} is no regular file: links, pipes and devices in a log are not followed")


def _unless_removed(error: OSError) -> None:
    """A folder that cannot be listed is not an empty one."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _sync(paths: Iterable[Path]) -> None:
    """fsync files or folders at once: the file system then writes its journal once, not once for each."""
    list(_pool().map(_sync_one, list(paths)))


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(32, "diffhook-fsync")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork


def _sync_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)  # Windows wants to write
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
