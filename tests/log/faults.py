"""A zarr Store that misbehaves as disks and networks do."""

from __future__ import annotations

import asyncio
import errno
import threading
import time
from collections.abc import Callable
from typing import Any

from zarr.abc.store import Store
from zarr.core.buffer import Buffer, cpu
from zarr.storage import WrapperStore

Fault = Callable[[str, Buffer], Buffer]


def sound(key: str, value: Buffer) -> Buffer:
    return value


def fails(code: int) -> Fault:
    """ENOSPC, EACCES …: every write is refused."""

    def fault(key: str, value: Buffer) -> Buffer:
        raise OSError(code, errno.errorcode[code], key)

    return fault


def hangs(until: threading.Event) -> Fault:
    def fault(key: str, value: Buffer) -> Buffer:
        until.wait(60)
        return value

    return fault


def slow(seconds: float) -> Fault:
    """Every write takes a while, and succeeds."""

    def fault(key: str, value: Buffer) -> Buffer:
        time.sleep(seconds)
        return value

    return fault


def short(share: float = 0.5) -> Fault:
    """Chunks are written in part, and nobody says so."""

    def fault(key: str, value: Buffer) -> Buffer:
        content = value.to_bytes()
        return cpu.Buffer.from_bytes(content[: int(len(content) * share)]) if "/c/" in key else value

    return fault


class FaultyStore(WrapperStore[Store]):
    """Passes everything on; ``fault`` sees each write first."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.fault: Fault = sound

    async def set(self, key: str, value: Buffer) -> None:
        await self._store.set(key, await asyncio.to_thread(self.fault, key, value))


class UnreachableStore(WrapperStore[Store]):
    """Nothing can be read or written while it is ``away``."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.away = True

    def _reach(self) -> None:
        if self.away:
            raise TimeoutError("the network is away")

    async def get(self, *args: Any, **options: Any) -> Buffer | None:
        self._reach()
        return await self._store.get(*args, **options)

    async def set(self, key: str, value: Buffer) -> None:
        self._reach()
        await self._store.set(key, value)
