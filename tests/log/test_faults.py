"""Faults below the store: training is never held up for long, and the log says what it lost."""

from __future__ import annotations

import errno
import random
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn
from zarr.core.buffer import Buffer
from zarr.storage import LocalStore, MemoryStore

from diffhook.capture import Recorder
from diffhook.errors import LogError
from diffhook.gradients import PerSampleGradients
from diffhook.log import LogWriter, Snapshot, durable, open_log
from diffhook.log.lock import lock_rank, release_rank
from diffhook.log.store import put
from diffhook.log.table_writer import TableWriter
from diffhook.log.testing import CONFIG, DIM, some_rows
from tests.log.faults import FaultyStore, fails, short, sound
from tests.runs import TinyDenoiser, train
from tests.waiting import wait_until


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffhook.log.table_writer.rows_per_shard", lambda dim, dtype: 16)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EIO])
def test_a_disk_that_refuses_writes_costs_nothing_once_it_takes_them_again(
    code: int, caplog: pytest.LogCaptureFixture
) -> None:
    store = FaultyStore(MemoryStore())
    writer = LogWriter(store, CONFIG)
    writer.put("train", some_rows(20))
    writer.flush()
    store.fault = fails(code)
    for step in range(20, 60, 4):
        assert writer.put("train", some_rows(4, step))
    wait_until(lambda: writer.failing)
    with pytest.raises(LogError, match=f"failed: .*{errno.errorcode[code]}.*; rows written before are safe"):
        writer.flush(timeout=0.3)
    assert open_log(store).train["sample"].tolist() == list(range(20))
    store.fault = sound
    writer.close()
    assert open_log(store).train["sample"].tolist() == list(range(60))
    assert open_log(store).dropped() == (0, 0)
    assert open_log(store).verify() == []
    told = [r.message for r in caplog.records if "keeps trying" in r.message]
    assert len(told) == 1, "told once for each time, not once for each attempt"


def test_a_disk_that_stays_full_ends_in_an_error_at_close_and_keeps_what_was_written(tmp_path: Path) -> None:
    store = FaultyStore(LocalStore(tmp_path / "log"))
    writer = LogWriter(store, CONFIG)
    writer.put("train", some_rows(16))
    writer.flush()
    store.fault = fails(errno.ENOSPC)
    writer.put("train", some_rows(16, 16))
    wait_until(lambda: writer.failing)
    with pytest.raises(LogError, match=r"ENOSPC.*; rows written before are safe"):
        writer.close(timeout=0.3)
    writer.close()
    assert open_log(tmp_path / "log").train["sample"].tolist() == list(range(16))


def _fails_once(store: FaultyStore, where: str) -> None:
    """The next write of such a key is refused; a second attempt would succeed."""

    def fault(key: str, value: Buffer) -> Buffer:
        if where in key:
            store.fault = sound
            raise OSError(errno.EIO, "EIO", key)
        return value

    store.fault = fault


@pytest.mark.parametrize("ending", ["step", "flush", "close"])
def test_a_strict_writer_raises_at_the_first_write_that_fails(ending: str) -> None:
    store = FaultyStore(MemoryStore())
    writer = LogWriter(store, CONFIG, strict=True)
    writer.put("train", some_rows(16))
    writer.flush()
    _fails_once(store, "/c/")
    assert writer.put("train", some_rows(16, 16))

    def train() -> None:
        for step in range(50_000):
            writer.put("train", some_rows(1, 32 + step))
            time.sleep(0.001)

    with pytest.raises(LogError, match=r"failed: .*EIO.*; rows written before are safe"):
        {"step": train, "flush": writer.flush, "close": writer.close}[ending]()
    assert open_log(store).train["sample"].tolist() == list(range(16))


@pytest.mark.parametrize("strict", [True, False])
def test_a_strict_run_ends_at_the_next_step_and_any_other_goes_on(strict: bool) -> None:
    store, steps = FaultyStore(MemoryStore()), []
    _fails_once(store, "/c/")

    def count(model: Any, *_: object) -> None:
        if not model.training:  # the probe at the end
            return
        steps.append(model)
        if len(steps) == 10:
            wait_until(lambda: store.fault is sound)

    def make_model() -> TinyDenoiser:
        model = TinyDenoiser()
        model.register_forward_pre_hook(count)
        return model

    def run(epochs: int) -> None:
        train(store, make_model=make_model, epochs=epochs, strict=strict, projection_dim=DIM)

    if strict:
        with pytest.raises(LogError, match="EIO"):
            run(epochs=10_000)
        assert 4 <= len(steps) < 30_000
    else:
        run(epochs=30)
        assert len(steps) == 90
        assert len(open_log(store).train) == 360


def _lossy_once(monkeypatch: pytest.MonkeyPatch, where: str) -> list[bool]:
    """The first fsync of such a file fails, and the system lets go of what was to be written."""
    sync, failing = durable._sync, [True]

    def lossy(paths: Any) -> None:
        paths = list(paths)
        if failing and any(where in path.parts for path in paths):
            failing.clear()
            for path in paths:
                if path.is_file():
                    path.write_bytes(b"")
            raise OSError(errno.EIO, "EIO")
        sync(paths)

    monkeypatch.setattr("diffhook.log.durable._sync", lossy)
    return failing


def test_what_a_failed_commit_vouched_for_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = LogWriter(tmp_path, CONFIG)
    failing = _lossy_once(monkeypatch, "projection")
    for step in range(5):
        writer.put("train", some_rows(20, 20 * step))
    writer.close()
    assert not failing
    assert open_log(tmp_path).train["sample"].tolist() == list(range(100))
    assert open_log(tmp_path).verify() == []


def test_what_the_commit_of_another_file_lost_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    LogWriter(tmp_path, CONFIG).close()
    store = open_log(tmp_path).writable_store()
    writer = TableWriter(store, "train/rank-0000", DIM, "float16")
    writer.append(some_rows(40))
    failing = _lossy_once(monkeypatch, "projection")
    with pytest.raises(OSError, match="EIO"):
        put(store, "summary.json", b"{}")
    assert not failing
    put(store, "summary.json", b"{}")
    writer.flush()
    assert open_log(tmp_path).train["sample"].tolist() == list(range(40))
    assert open_log(tmp_path).verify() == []


def test_a_short_write_is_found_where_it_is(tmp_path: Path) -> None:
    store = FaultyStore(LocalStore(tmp_path / "log"))
    writer = LogWriter(store, CONFIG)
    writer.put("train", some_rows(16))
    writer.flush()
    store.fault = short()
    writer.put("train", some_rows(16, 16))
    writer.flush()
    store.fault = sound
    writer.put("train", some_rows(16, 32))
    writer.close()
    log = open_log(tmp_path / "log")
    with pytest.raises(LogError, match="train/rank-0000/"):
        _ = log.train["loss"]
    found = log.verify()
    assert found
    assert all("rows 16 to 31 are lost" in line for line in found)


def test_a_removed_folder_ends_the_capture_and_is_not_written_anew(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path / "log", CONFIG)
    writer.put("train", some_rows(16))
    writer.flush()
    shutil.rmtree(tmp_path / "log")
    writer.put("train", some_rows(16, 16))
    with pytest.raises(LogError, match="train/rank-0000 has vanished while it was written"):
        writer.flush()
    with pytest.raises(LogError, match="vanished"):
        writer.put("train", some_rows(1, 32))
    assert not (tmp_path / "log" / "train" / "rank-0000").exists()


@pytest.mark.parametrize("what", ["rows", "snapshot", "alert", "nothing but its end"])
@pytest.mark.parametrize("moved", [True, False], ids=["moved", "removed"])
def test_a_log_that_another_run_has_taken_the_place_of_is_not_written_into(
    moved: bool, what: str, tmp_path: Path
) -> None:
    writer = LogWriter(tmp_path / "log", CONFIG)
    writer.put("train", some_rows(16))
    writer.flush()
    other = LogWriter(tmp_path / "other", CONFIG)
    other.put("train", some_rows(20, 100))
    other.close()
    (tmp_path / "log").rename(tmp_path / "moved") if moved else shutil.rmtree(tmp_path / "log")
    (tmp_path / "other").rename(tmp_path / "log")
    before = {p: p.read_bytes() for p in (tmp_path / "log").rglob("*") if p.is_file()}
    jobs: dict[str, Callable[[], object]] = {
        "rows": lambda: writer.put("train", some_rows(40, 16)),
        "snapshot": lambda: writer.snapshot(Snapshot(4, 0.1, 0.1), b"weights"),
        "alert": lambda: writer.alert({"step": 3, "kind": "test", "message": "…"}),
    }

    def go_on() -> None:
        jobs.get(what, lambda: None)()
        writer.close()

    with pytest.raises(LogError, match="train/rank-0000 was written by another run while it was written"):
        go_on()
    with suppress(LogError):  # where the job before had failed already
        writer.close()
    assert {p: p.read_bytes() for p in (tmp_path / "log").rglob("*") if p.is_file()} == before
    if moved:
        assert open_log(tmp_path / "moved").train["sample"].tolist() == list(range(16))


class PowerCutError(Exception):
    """The power fails."""


def _restore(path: Path, content: bytes | None) -> None:
    """A file as it is found after the cut; None: its name was lost."""
    if content is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _write_until_the_cut(root: Path, budget: list[int]) -> int:
    """Rows of which a flush has returned before the power went, or all."""
    flushed, writer = 0, None
    try:
        writer = LogWriter(root, CONFIG)
        for step in range(12):
            writer.put("train", some_rows(5, 5 * step, step=step))
            if step % 3 == 2:
                writer.snapshot(Snapshot(step, 0.1, 0.1), b"weights %d" % step)
            writer.flush(timeout=0.05)
            flushed = 5 * (step + 1)
        writer.close()
    except (PowerCutError, LogError):
        budget[0] = -1
        if writer is not None:
            with pytest.raises(LogError):
                writer.close(timeout=0.0)
    return flushed


@pytest.mark.parametrize("seed", range(12))
def test_after_a_power_cut_what_is_committed_is_whole(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Operations are stopped at any of them; content without fsync and names without fsync of their
    folder are then lost or kept at random, in any order."""
    rng = random.Random(seed)
    root, disk = tmp_path / "log", tmp_path / "disk"
    files: dict[Path, bytes] = {}  # content that is safe
    names: dict[Path, list[bytes | None]] = {}  # name → what it may show: the safe one, then later ones
    budget = [rng.randrange(25, 220)]

    def operation() -> None:
        budget[0] -= 1
        if budget[0] < 0:
            raise PowerCutError

    def sync(paths: Any) -> None:
        for path in list(paths):
            operation()
            if path.is_dir():
                for name, versions in names.items():
                    if name.parent == path:
                        del versions[:-1]
            else:
                files[path] = path.read_bytes()

    rename = Path.replace

    def replace(path: Path, target: Path) -> Path:
        operation()
        content = files.get(path, b"")  # a file without fsync comes back empty
        names.setdefault(Path(target), [None]).append(content)
        return rename(path, target)

    monkeypatch.setattr("diffhook.log.durable._sync", sync)
    monkeypatch.setattr(Path, "replace", replace)
    flushed = _write_until_the_cut(root, budget)
    monkeypatch.setattr(Path, "replace", rename)
    for name, versions in names.items():
        _restore(disk / name.relative_to(root), rng.choice(versions))
    if not (disk / "zarr.json").exists():
        assert flushed == 0
        return
    log = open_log(disk)
    samples = log.train["sample"].tolist()
    assert samples == list(range(len(samples)))
    assert len(samples) >= flushed, "a flush had returned"
    assert log.verify() == []
    if samples:
        assert np.array_equal(log.train["loss"][:5], some_rows(5)["loss"])
    assert all(s.parameters() == b"weights %d" % s.step for s in log.snapshots)


def test_a_run_whose_log_has_failed_lets_go_of_all_of_it(tmp_path: Path) -> None:
    engine = PerSampleGradients(nn.Linear(DIM, 1), projection_dim=DIM)
    recorder = Recorder(engine, tmp_path / "log", CONFIG)
    recorder.writer.put("train", some_rows(16))
    recorder.writer.flush()
    shutil.rmtree(tmp_path / "log" / "train")
    recorder.writer.put("train", some_rows(16, 16))
    with pytest.raises(LogError, match="vanished"):
        recorder.writer.flush()
    recorder._waiting.stage(some_rows(4), None)
    with pytest.raises(LogError, match="vanished"):
        recorder.close()
    assert not recorder.writer._backlog._thread.is_alive()
    lock_rank(recorder.writer.store, 0, engine)  # is free
    release_rank(recorder.writer.store, 0, engine)
