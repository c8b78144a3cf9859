"""Disks that are slow, hang or refuse: training is held up for a bounded time, and nothing is lost unsaid."""

from __future__ import annotations

import asyncio
import errno
import logging
import re
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from zarr.abc.store import Store
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore, WrapperStore

from diffhook.capture import Recorder
from diffhook.capture.recording.incoming_rows import IncomingRows
from diffhook.capture.recording.timestep_units import TimestepUnits
from diffhook.cli.info import describe
from diffhook.errors import LogError
from diffhook.log import LogWriter, Snapshot, open_log
from diffhook.log.testing import CONFIG, some_rows
from tests.log.faults import FaultyStore, UnreachableStore, fails, hangs, slow, sound

ROW_BYTES = sum(column.nbytes for column in some_rows(1).values())


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffhook.log.table_writer.rows_per_shard", lambda dim, dtype: 16)


def test_a_slow_disk_holds_training_up_once_and_then_costs_whole_steps(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FaultyStore(MemoryStore())
    patience, waiting = 0.2, 10 * 4 * ROW_BYTES
    wait_for, in_vain = threading.Condition.wait_for, []

    def noted(condition: threading.Condition, ready: Any, timeout: float | None = None) -> Any:
        if not (came := wait_for(condition, ready, timeout)):
            in_vain.append(timeout)
        return came

    writer = LogWriter(store, CONFIG, memory=waiting, patience=patience)
    released = threading.Event()
    store.fault = hangs(released)
    taken = []
    with monkeypatch.context() as patched:
        patched.setattr(threading.Condition, "wait_for", noted)
        for step in range(200):
            taken.append(writer.put("train", some_rows(4, 4 * step, step=step)))
    assert in_vain == [patience], "waits once, not at every step"
    assert sum(taken) <= 10 + 16 // 4, "no more waits than memory allows, besides the shard begun"
    released.set()
    writer.flush()
    assert writer.put("train", some_rows(4, 4 * 200, step=200)), "taken again, once there is room"
    writer.close()
    log = open_log(store)
    steps, counts = np.unique(log.train["step"], return_counts=True)
    assert steps.tolist() == [*np.flatnonzero(taken), 200]
    assert set(counts) == {4}, "steps are whole"
    assert log.dropped() == (200 - sum(taken), 4 * (200 - sum(taken)))
    assert (writer.dropped_steps, writer.dropped_rows) == log.dropped()
    assert log.verify() == []
    assert [r.levelno for r in caplog.records if "leaves out steps" in r.message] == [logging.WARNING]


def test_a_store_that_is_away_at_the_opening_is_waited_for_and_no_row_is_lost(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = FaultyStore(MemoryStore())
    store.fault = fails(errno.ENOSPC)
    writer = LogWriter(store, CONFIG)
    assert (writer.session, writer.will_supersede(), writer.position()) == (-1, "", None)
    assert all(writer.put("train", some_rows(4, 4 * step, step=step)) for step in range(20))
    writer.alert({"kind": "drift", "samples": [], "step": 3})
    assert writer.snapshot(Snapshot(20, 0.1, 0.1), b"weights")
    store.fault = sound
    writer.close()
    log = open_log(store)
    assert log.train["sample"].tolist() == list(range(80))
    assert [s.step for s in log.snapshots] == [20]
    assert [a["step"] for a in log.alerts()] == [3]
    assert "keeps trying, and training goes on" in caplog.text


def test_a_store_that_turns_out_to_hold_another_log_ends_the_capture_and_is_left_alone() -> None:
    memory = MemoryStore()
    other = {"identity": {**CONFIG["identity"], "dataset": {"samples": 3}}}  # type: ignore[dict-item]
    LogWriter(memory, other).close()
    before = {key: value.to_bytes() for key, value in memory._store_dict.items()}
    store = UnreachableStore(memory)
    mine = {"identity": {**CONFIG["identity"], "dataset": {"samples": 4}}}  # type: ignore[dict-item]
    writer = LogWriter(store, mine)
    writer.put("train", some_rows(4))
    store.away = False
    with pytest.raises(LogError, match=r"another dataset: dataset\.samples: the log has 3, this run 4"):
        writer.close()
    assert before == {key: value.to_bytes() for key, value in memory._store_dict.items()}


def test_a_disk_that_stays_full_does_not_keep_a_short_run_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No wait is longer than what is allowed a disk that fails: it is not waited for as if it were slow."""
    monkeypatch.setattr("diffhook.log.backlog._TRIES", 0.2)
    monkeypatch.setattr("diffhook.log.backlog.LAST_TRIES", 0.2)
    writer = LogWriter(tmp_path, CONFIG)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "ENOSPC")

    monkeypatch.setattr("diffhook.log.durable.DurableStore.write", full)
    for step in range(10):
        writer.put("train", some_rows(4, 4 * step, step=step))
    for end in (writer.flush, writer.close):  # each may wait a minute for one that works
        began = time.monotonic()
        with pytest.raises(LogError, match="ENOSPC"):
            end()
        assert time.monotonic() - began < 30, "the limit is that of a disk that works"


def _refusing(store: FaultyStore, *, attempts: int, part: bool) -> None:
    """So many attempts at the rows fail, at their first file or, where a ``part`` gets through, at a later
    one."""
    left = [attempts]

    def fault(key: str, value: Any) -> Any:
        if left[0] > 0 and (not part or key.endswith("sample/c/0")):
            left[0] -= 1
            time.sleep(0.02)
            raise TimeoutError("503")
        return value

    store.fault = fault


@pytest.mark.parametrize(("attempts", "part"), [(4, False), (40, True)])
def test_a_network_is_tried_at_the_end_as_long_as_it_is_slow_or_takes_a_part(
    attempts: int, part: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seconds say little of it on a busy machine: fewer attempts fit into them."""
    monkeypatch.setattr("diffhook.log.backlog._LAST_PAUSE", 0.01)
    store = FaultyStore(MemoryStore())
    writer = LogWriter(store, CONFIG)
    writer.flush()
    _refusing(store, attempts=attempts, part=part)
    writer.put("train", some_rows(16))
    writer.close(timeout=0.1)
    assert open_log(store).train["sample"].tolist() == list(range(16))


class Deaf(WrapperStore[Store]):
    """The next request to write is never answered."""

    deaf = False

    async def set(self, key: str, value: Buffer) -> None:
        if self.deaf:
            self.deaf = False
            await asyncio.Event().wait()
        await self._store.set(key, value)


def test_a_request_that_is_never_answered_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients of networks hang now and then, whatever their own limits are."""
    monkeypatch.setattr("diffhook.log.store._LONGEST_REQUEST", 0.3)
    store = Deaf(MemoryStore())
    writer = LogWriter(store, CONFIG)
    writer.put("train", some_rows(16))
    writer.flush()
    store.deaf = True
    writer.put("train", some_rows(16, 16))
    writer.close()
    assert not store.deaf
    assert open_log(store).train["sample"].tolist() == list(range(32))


@pytest.mark.parametrize("part", [False, True])
def test_a_network_that_never_comes_back_is_given_up(part: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffhook.log.backlog._LAST_PAUSE", 0.001)
    monkeypatch.setattr("diffhook.log.backlog._MOST_ATTEMPTS", 12)
    store = FaultyStore(MemoryStore())
    writer = LogWriter(store, CONFIG)
    writer.flush()
    _refusing(store, attempts=10**6, part=part)
    writer.put("train", some_rows(16))
    with pytest.raises(LogError, match="503; rows written before are safe"):
        writer.close(timeout=0.1)
    assert writer._backlog._attempts >= 5


def test_alerts_are_taken_though_the_disk_cannot_take_rows() -> None:
    store, released = FaultyStore(MemoryStore()), threading.Event()
    writer = LogWriter(store, CONFIG, memory=4 * ROW_BYTES, patience=0.1)
    store.fault = hangs(released)
    taken = [writer.put("train", some_rows(4, 4 * step, step=step)) for step in range(50)]
    assert not all(taken)
    for step in range(50):
        writer.alert({"kind": "drift", "samples": [], "step": step})
    released.set()
    writer.close()
    assert [alert["step"] for alert in open_log(store).alerts()] == list(range(50))


def test_a_disk_that_hangs_does_not_keep_close_from_returning() -> None:
    store = FaultyStore(MemoryStore())
    writer = LogWriter(store, CONFIG)
    released = threading.Event()
    store.fault = hangs(released)
    writer.put("train", some_rows(16))
    with pytest.raises(LogError, match=r"nothing more was written for 0\.5 s"):  # it may be a network
        writer.close(timeout=0.1)
    released.set()


def test_a_snapshot_waits_for_a_slow_flush_before_it() -> None:
    store = FaultyStore(MemoryStore())
    writer = LogWriter(store, CONFIG, memory=500, patience=0.05)
    writer.put("train", some_rows(4))
    store.fault = slow(0.02)
    assert writer.snapshot(Snapshot(1, 0.1, 0.1), bytes(600))
    store.fault = sound
    writer.close()
    log = open_log(store)
    assert [s.step for s in log.snapshots] == [1]
    assert log.dropped_snapshots() == 0


@pytest.mark.parametrize("reason", ["it hangs", "it fails: .*ENOSPC"])
def test_a_snapshot_that_is_left_out_is_told_and_counted(
    reason: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffhook.log.backlog.HANGS", 0.3 if "hangs" in reason else 60.0)
    store = FaultyStore(MemoryStore())
    writer = LogWriter(store, CONFIG, memory=500, patience=0.05)
    writer.put("train", some_rows(4))
    released = threading.Event()
    store.fault = hangs(released) if "hangs" in reason else fails(errno.ENOSPC)
    assert not writer.snapshot(Snapshot(7, 0.1, 0.1), bytes(600))
    store.fault = sound
    released.set()
    writer.close()
    log = open_log(store)
    assert log.snapshots == []
    assert log.dropped_snapshots() == describe(log)["snapshots left out"] == 1
    assert log.train["sample"].tolist() == list(range(4))
    (told,) = [r for r in caplog.records if "leaves out the snapshot" in r.message]
    assert re.search(f"of step 7: .* cannot take it, {reason}", told.message)
    assert told.levelno == logging.WARNING


def test_a_disk_that_hangs_holds_up_one_checkpoint_and_the_next_ones_only_a_moment(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffhook.capture.recording.recorder._LONGEST_WAIT", 0.2)
    monkeypatch.setattr("diffhook.capture.recording.recorder._ONE_MORE_TRY", 0.1)
    store, waits = FaultyStore(MemoryStore()), []
    recorder = object.__new__(Recorder)  # of which this needs no more
    recorder.writer = writer = LogWriter(store, CONFIG)
    recorder.incoming = IncomingRows(None, TimestepUnits(None), lambda rows, layer: None)
    recorder.snapshot_seconds = 0.0
    flush = writer.flush
    monkeypatch.setattr(writer, "flush", lambda timeout: (waits.append(timeout), flush(timeout)))
    released = threading.Event()
    store.fault = hangs(released)
    writer.put("train", some_rows(4))
    for _ in range(3):
        recorder.settle()
    assert waits == [0.2, 0.1, 0.1]
    assert [r.levelno for r in caplog.records if "before this checkpoint" in r.message] == [logging.WARNING]
    store.fault = sound
    released.set()
    flush()
    assert not writer.failing, "and the next checkpoint waits for it again"
    writer.close()


def test_close_waits_for_a_slow_disk_as_long_as_it_works() -> None:
    store = FaultyStore(MemoryStore())
    writer = LogWriter(store, CONFIG)
    store.fault = slow(0.02)
    for step in range(2):
        writer.put("train", some_rows(16, 16 * step, step=step))
        writer.snapshot(Snapshot(step, 0.1, 0.1), b"weights")
    writer.close(timeout=0.6)  # of more than a second
    log = open_log(store)
    assert log.train["sample"].tolist() == list(range(32))
    assert [s.step for s in log.snapshots] == [0, 1]


def test_close_gives_a_large_snapshot_time_for_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffhook.log.backlog._SLOWEST", 1000)
    store = FaultyStore(MemoryStore())
    writer = LogWriter(store, CONFIG)
    writer.flush()
    store.fault = lambda key, value: slow(1.5)(key, value) if "parameters" in key else value
    writer.snapshot(Snapshot(1, 0.1, 0.1), bytes(9000))
    writer.close(timeout=0.5)
    (snapshot,) = open_log(store).snapshots
    assert snapshot.parameters() == bytes(9000)
