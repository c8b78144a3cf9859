"""Snapshots that are too large to be copied: written part by part, of one moment or not at all."""

from __future__ import annotations

import errno
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from diffhook.log import Content, LogWriter, Snapshot, open_log
from diffhook.log.durable import DurableStore
from diffhook.log.testing import CONFIG, some_rows

PART = 1 << 16


class Parameters:
    """Of a training that goes on: four parts, each filled with the number of the step."""

    def __init__(self, parts: int = 4) -> None:
        self.step = 0
        self.count = parts
        self.before_part: Callable[[int], Any] = lambda index: None

    def content(self) -> Content:
        return Content(self.count * PART, self._parts)

    def _parts(self) -> Iterator[bytes]:
        for index in range(self.count):
            self.before_part(index)
            yield bytes([self.step]) * PART


@pytest.fixture(autouse=True)
def _nothing_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffhook.log.writer._COPIED", 0)


def test_it_is_of_the_step_at_which_it_was_asked_for_and_is_never_held_whole(tmp_path: Path) -> None:
    parameters = Parameters(parts=256)
    writer = LogWriter(tmp_path / "log", CONFIG)
    tracemalloc.start()
    for parameters.step in (1, 2):
        assert writer.snapshot(Snapshot(parameters.step, 0.1, 0.1), parameters.content())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    writer.close()
    assert peak < 256 * PART / 10
    for snapshot in open_log(tmp_path / "log").snapshots:
        assert snapshot.parameters() == bytes([snapshot.step]) * (256 * PART)


def _assert_left_out(writer: LogWriter, parameters: Parameters, log: Path) -> None:
    """The snapshot of step 1 was left out, and the training goes on: its files hold no mixture."""
    writer.flush()
    parameters.step = 3
    writer.put("train", some_rows(4, 4))
    assert writer.snapshot(Snapshot(3, 0.1, 0.1), parameters.content())
    writer.close()
    found = open_log(log)
    assert [snapshot.step for snapshot in found.snapshots] == [3]
    assert found.snapshots[0].parameters() == bytes([3]) * (4 * PART)
    assert found.dropped_snapshots() == 1
    assert [path.parent.name for path in log.rglob("*.safetensors*")] == ["step-00000003"]
    assert len(found.train) == 8


def test_where_the_disk_hangs_half_way_it_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffhook.log.backlog.HANGS", 0.3)
    released, parameters = threading.Event(), Parameters()
    parameters.step = 1
    parameters.before_part = lambda index: index == 2 and released.wait()
    writer = LogWriter(tmp_path / "log", CONFIG)
    writer.put("train", some_rows(4))
    assert not writer.snapshot(Snapshot(1, 0.1, 0.1), parameters.content())
    parameters.step = 2
    released.set()
    _assert_left_out(writer, parameters, tmp_path / "log")


def test_where_the_disk_fails_it_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the disk works again: by then the parameters are others."""
    full, write = threading.Event(), DurableStore.write

    def failing(store: DurableStore, key: str, parts: Any) -> None:
        write(store, key, parts)
        if full.is_set() and key.endswith("safetensors"):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(DurableStore, "write", failing)
    parameters = Parameters()
    writer = LogWriter(tmp_path / "log", CONFIG, patience=0.1)
    writer.put("train", some_rows(4))
    full.set()
    parameters.step = 1
    assert not writer.snapshot(Snapshot(1, 0.1, 0.1), parameters.content())
    parameters.step = 2
    full.clear()
    _assert_left_out(writer, parameters, tmp_path / "log")
