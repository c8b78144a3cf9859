"""A log in an icechunk repository: every flush is a commit. Needs the extra "icechunk".

icechunk stores zarr groups and arrays only, so the log's small files lie in it as arrays of bytes.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from zarr.abc.store import ByteRequest, Store
from zarr.storage import WrapperStore

from diffhook.compat.zarr import Buffer, BufferPrototype, default_buffer_prototype

if TYPE_CHECKING:
    import icechunk

_SUFFIX = ".bytes"  # of the array that stands for a file


class IcechunkStore(WrapperStore[Store]):
    """A zarr Store on a branch of a repository.

    Example:
        >>> DiffHook(accelerator, IcechunkStore(repository))
        >>> open_log(IcechunkStore(repository))

    Args:
        repository: an ``icechunk.Repository``; one process writes to a branch.
        branch: what to read and write.
    """

    def __init__(self, repository: icechunk.Repository, branch: str = "main") -> None:
        self._repository, self._branch = repository, branch
        self._session: Any = repository.writable_session(branch)
        super().__init__(self._session.store)

    def commit(self) -> None:
        """Publish what was set since the last commit."""
        if self._session.has_uncommitted_changes:
            self._session.commit("diffhook")
            self._session = self._repository.writable_session(self._branch)
            self._store = self._session.store

    def __str__(self) -> str:
        return f"icechunk branch {self._branch!r}"

    # ── zarr's interface ──────────────────────────────────────────────────────────────────────

    async def set(self, key: str, value: Buffer) -> None:
        if not _is_file(key):
            await self._parents(key)
            await super().set(key, value)
            return
        await self._parents(key)
        content = json.dumps(_file_metadata(len(value))).encode()
        await super().set(f"{key}{_SUFFIX}/zarr.json", _buffer(content))
        await super().set(f"{key}{_SUFFIX}/c/0", value)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        if not await self.exists(key):
            return None
        return await super().get(_stored(key), prototype, byte_range)

    async def exists(self, key: str) -> bool:
        return await super().exists(f"{key}{_SUFFIX}/zarr.json" if _is_file(key) else key)

    async def delete(self, key: str) -> None:
        await super().delete(_stored(key))
        if _is_file(key):
            await super().delete(f"{key}{_SUFFIX}/zarr.json")

    async def getsize(self, key: str) -> int:
        return await super().getsize(_stored(key))

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        place = prefix.rstrip("/")
        if place and not await super().exists(f"{place}/zarr.json"):
            return  # icechunk lists what is below groups and arrays only
        async for key in super().list_prefix(prefix):
            if not key.endswith(f"{_SUFFIX}/zarr.json"):
                yield key.removesuffix(f"{_SUFFIX}/c/0") if f"{_SUFFIX}/" in key else key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        async for name in super().list_dir(prefix):
            yield name.removesuffix(_SUFFIX)

    async def _parents(self, key: str) -> None:
        """icechunk takes nothing below a group that is not there."""
        parts = key.split("/")[:-1]
        if "c" in parts:
            return
        group = _buffer(b'{"zarr_format": 3, "node_type": "group", "attributes": {}}')
        for depth in range(len(parts) + 1):
            parent = "/".join([*parts[:depth], "zarr.json"])
            if parent != key and not await super().exists(parent):
                await super().set(parent, group)


def _is_file(key: str) -> bool:
    parts = key.split("/")
    return parts[-1] != "zarr.json" and "c" not in parts[:-1]


def _stored(key: str) -> str:
    return f"{key}{_SUFFIX}/c/0" if _is_file(key) else key


def _file_metadata(size: int) -> dict[str, Any]:
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [size],
        "data_type": "uint8",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [max(size, 1)]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": [{"name": "bytes"}],
        "attributes": {},
    }


def _buffer(content: bytes) -> Buffer:
    return default_buffer_prototype().buffer.from_bytes(content)
