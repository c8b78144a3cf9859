"""Every kind of place that a log can lie in keeps the contract of stores; one that forgets breaks it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import icechunk
import pytest
from zarr.storage import FsspecStore, LocalStore, MemoryStore

from diffhook.log import open_log
from diffhook.log.icechunk import IcechunkStore
from diffhook.log.store import Location
from diffhook.log.testing import StoreContract


class TestFolder(StoreContract):
    def open(self, folder: Path) -> Location:
        return folder


class TestLocalStore(StoreContract):
    def open(self, folder: Path) -> Location:
        return LocalStore(folder)


class TestFsspec(StoreContract):
    def open(self, folder: Path) -> Location:
        return FsspecStore.from_url(f"file://{folder}", storage_options={"auto_mkdir": True})


class _Held(StoreContract):
    """Of stores that are gone with their object."""

    def setup_method(self) -> None:
        self._held: dict[Path, Any] = {}

    def open(self, folder: Path) -> Location:
        if folder not in self._held:
            self._held[folder] = self.make()
        return self.again(self._held[folder])

    def make(self) -> Any:
        raise NotImplementedError

    def again(self, held: Any) -> Location:
        return held


class TestMemory(_Held):
    def make(self) -> Any:
        return {}

    def again(self, held: Any) -> Location:
        return MemoryStore(held)


class TestIcechunk(_Held):
    def make(self) -> Any:
        return icechunk.Repository.create(icechunk.in_memory_storage())

    def again(self, held: Any) -> Location:
        return IcechunkStore(held)


class Forgetful(MemoryStore):
    """Drops what is written over something else."""

    async def set(self, key: str, value: Any, byte_range: Any = None) -> None:
        if not await self.exists(key):
            await super().set(key, value, byte_range)


def test_a_store_that_forgets_breaks_it(tmp_path: Path) -> None:
    held: dict[str, Any] = {}

    class Contract(StoreContract):
        def open(self, folder: Path) -> Location:
            return Forgetful(held)

    with pytest.raises(AssertionError):
        Contract().test_a_reader_sees_what_is_flushed_while_training_goes_on(tmp_path)
    assert len(open_log(Forgetful(held)).train) < 12
