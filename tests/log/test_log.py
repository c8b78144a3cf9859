"""The log on disk: written in shards by a thread, read back exactly, never mixed."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import zarr
import zarr.storage

from diffhook.appearance import COLUMNS as APPEARANCE
from diffhook.errors import LogError
from diffhook.log import LogWriter, Snapshot, open_log, opening, schema
from diffhook.log.root import write_root
from diffhook.log.testing import CONFIG, some_rows
from tests.waiting import wait_until


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffhook.log.table_writer.rows_per_shard", lambda dim, dtype: 16)


@pytest.fixture(params=["folder", "memory", "url"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param == "memory":
        return zarr.storage.MemoryStore()
    return tmp_path / "log" if request.param == "folder" else f"memory://{tmp_path}/log"


@pytest.mark.parametrize("sizes", [[3], [16], [5, 5, 5, 5, 5], [100], [1] * 20])
def test_rows_come_back_as_they_were(location: Any, sizes: list[int]) -> None:
    writer = LogWriter(location, CONFIG)
    written, first = [], 0
    for size in sizes:
        written.append(some_rows(size, first))
        writer.put("train", written[-1])
        first += size
    writer.close()
    log = open_log(location)
    assert len(log.train) == first
    for column in log.train.columns:
        np.testing.assert_array_equal(log.train[column], np.concatenate([r[column] for r in written]))
    blocks = list(log.train.blocks())
    assert [b.stop - b.start for b in blocks[:-1]] == [16] * (len(blocks) - 1)
    assert [b.offset for b in blocks] == [b.start for b in blocks]
    assert log.verify() == []


def test_columns_that_nobody_names_are_as_good_as_absent(location: Any) -> None:
    writer = LogWriter(location, CONFIG)
    optional = {column.name for column in schema.COLUMNS if column.optional}
    writer.put("train", {name: v for name, v in some_rows(20).items() if name not in optional})
    writer.close()
    table = open_log(location).train
    assert table["role"].tolist() == [0] * 20
    assert all(np.isnan(table[name]).all() for name in APPEARANCE)


def test_a_log_from_before_a_column_was_known_goes_on_without_it(
    location: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fewer = tuple(column for column in schema.COLUMNS if column.name not in APPEARANCE)
    with monkeypatch.context() as before:
        before.setattr("diffhook.log.table_writer.COLUMNS", fewer)
        writer = LogWriter(location, CONFIG)
        writer.put("train", {name: v for name, v in some_rows(20).items() if name not in APPEARANCE})
        writer.close()
    writer = LogWriter(location, CONFIG, start_step=5)
    writer.put("train", some_rows(20, 20))
    writer.close()
    log = open_log(location)
    assert log.train["sample"].tolist() == list(range(40))
    assert all(np.isnan(log.train[name]).all() for name in APPEARANCE)
    assert log.verify() == []


def test_a_shard_begun_is_continued_after_a_flush_and_in_a_later_process(location: Any) -> None:
    for session in range(3):
        writer = LogWriter(location, CONFIG, start_step=session * 100)
        for part in range(3):
            writer.put("train", some_rows(5, session * 15 + part * 5, step=session * 100 + part))
            writer.flush()
        writer.close()
    assert open_log(location).train["sample"].tolist() == list(range(45))


def test_rows_that_were_not_committed_are_never_read(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path, CONFIG)
    writer.put("train", some_rows(20))
    writer.close()
    mark = tmp_path / "train/rank-0000/zarr.json"
    before = mark.read_bytes()
    writer = LogWriter(tmp_path, CONFIG, start_step=7)
    writer.put("train", some_rows(20, 20))
    writer.close()
    mark.write_bytes(before)  # as if killed before the last mark
    litter = tmp_path / f"train/rank-0000/loss/c/3.{'0' * 32}.partial"
    litter.write_bytes(b"half")
    assert open_log(tmp_path).train["sample"].tolist() == list(range(20))
    writer = LogWriter(tmp_path, CONFIG, start_step=9)
    assert not litter.exists()
    writer.put("train", some_rows(10, 20, step=9))
    writer.close()
    log = open_log(tmp_path)
    assert log.train["sample"].tolist() == list(range(30))
    assert log.verify() == []


def test_rows_that_fill_no_shard_count_before_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow training may take hours to fill one, and may be killed."""
    monkeypatch.setattr("diffhook.log.writer._LONGEST", 0.1)
    log = LogWriter(tmp_path / "log", CONFIG)
    with closing(log):
        log.put("train", some_rows(3))
        wait_until(lambda: log.rows_in_memory == 3)
        time.sleep(0.2)
        log.put("train", some_rows(2))
        wait_until(lambda: log.rows_in_memory == 0)
        assert len(open_log(tmp_path / "log").train) == 5


def test_a_session_that_starts_earlier_supersedes_rows_and_snapshots_after_it(tmp_path: Path) -> None:
    for session, (start, stop) in enumerate([(0, 10), (6, 12), (8, 9)]):
        writer = LogWriter(tmp_path, CONFIG, start_step=start)
        for step in range(start, stop):
            writer.put("train", some_rows(2, 1000 * session + step, step=step))
        writer.snapshot(Snapshot(stop, 0.1, 0.3, writer.session), b"weights")
        writer.close()
    log = open_log(tmp_path)
    table = log.train
    found = sorted(zip(table["step"].tolist(), (table["sample"] // 1000).tolist(), strict=True))
    expected = [(s, 0) for s in range(6)] + [(6, 1), (7, 1), (8, 2)]
    assert found == sorted(2 * expected)
    assert [s.step for s in log.snapshots] == [9]


def test_each_rank_has_its_own_group(tmp_path: Path) -> None:
    writers = [LogWriter(tmp_path, CONFIG, rank=rank) for rank in (1, 0, 2)]
    for writer in writers:
        writer.put("train", some_rows(20, 100 * writer.rank))
    for writer in writers:
        writer.close()
    log = open_log(tmp_path)
    assert log.train["sample"].tolist() == [*range(20), *range(100, 120), *range(200, 220)]
    assert sorted(p.name for p in (tmp_path / "train").glob("rank-*")) == [
        "rank-0000", "rank-0001", "rank-0002",
    ]  # fmt: skip


def test_snapshots_keep_parameters_step_and_rates(location: Any) -> None:
    writer = LogWriter(location, CONFIG)
    writer.snapshot(Snapshot(5, 0.1, 0.5), b"five")
    writer.snapshot(Snapshot(10, 0.05, 0.3), b"ten")
    writer.close()
    five, ten = open_log(location).snapshots
    assert (five.step, five.lr, five.lr_sum, five.parameters()) == (5, 0.1, 0.5, b"five")
    assert (ten.step, ten.parameters()) == (10, b"ten")


def test_a_snapshot_without_its_description_does_not_exist(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path, CONFIG)
    writer.snapshot(Snapshot(5, 0.1, 0.5), b"five")
    writer.close()
    (tmp_path / "snapshots/step-00000005/snapshot.json").unlink()
    assert open_log(tmp_path).snapshots == []


def test_another_configuration_is_refused_by_name(tmp_path: Path) -> None:
    LogWriter(tmp_path, CONFIG).close()
    other = {**CONFIG, "identity": {**CONFIG["identity"], "projection": {**CONFIG["identity"]["projection"]}}}  # type: ignore[dict-item]
    other["identity"]["projection"]["dim"] = 16  # type: ignore[index]
    with pytest.raises(LogError, match=r"projection\.dim: the log has 8, this run 16"):
        LogWriter(tmp_path, other)
    changed = {**CONFIG, "identity": {**CONFIG["identity"], "model": {"class": "Other"}}}  # type: ignore[dict-item]
    with pytest.raises(LogError, match=r"model\.class: the log has 'Tiny', this run 'Other'"):
        LogWriter(tmp_path, changed)
    LogWriter(tmp_path, {**CONFIG, "versions": {"torch": "99"}}).close()


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("…")
    with pytest.raises(LogError, match=r"is not empty and holds no diffhook log \(it has 'thesis.tex'\)"):
        LogWriter(tmp_path, CONFIG)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(LogError, match="it holds no zarr group"):
        open_log(tmp_path)
    with pytest.raises(LogError, match="the folder does not exist"):
        open_log(tmp_path / "nowhere")
    with pytest.raises(LogError, match="is a file"):
        open_log(tmp_path / "thesis.tex")


def test_a_log_that_another_process_begins_at_the_same_moment_is_no_foreign_one(tmp_path: Path) -> None:
    listed = opening.files.names

    def late(store: Any, place: str) -> list[str]:
        if not place and not (tmp_path / "zarr.json").exists():
            write_root(store, CONFIG)
        return listed(store, place)

    with mock.patch.object(opening.files, "names", late):
        LogWriter(tmp_path, CONFIG).close()
    assert open_log(tmp_path).verify() == []


def test_another_programs_zarr_group_is_refused(tmp_path: Path) -> None:
    zarr.create_group(tmp_path / "other")
    with pytest.raises(LogError, match="not one of diffhook's"):
        open_log(tmp_path / "other")
    with pytest.raises(LogError, match="not one of diffhook's"):
        LogWriter(tmp_path / "other", CONFIG)


def test_alerts_of_all_ranks_come_by_step(tmp_path: Path) -> None:
    for rank, steps in ((0, (5, 1)), (1, (3,))):
        writer = LogWriter(tmp_path, CONFIG, rank=rank)
        for step in steps:
            writer.alert({"step": step, "kind": "test"})
        writer.close()
    assert [a["step"] for a in open_log(tmp_path).alerts()] == [1, 3, 5]


def test_thumbnails_come_back_by_id_and_only_if_asked_for(
    location: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffhook.log.thumbnails._PACK_BYTES", 200)
    png = b"\x89PNG\r\n\x1a\n" + bytes(40)
    for session in range(2):
        writer = LogWriter(location, CONFIG, start_step=session)
        if not session:
            assert not open_log(location).thumbnails
        for sample in range(20 * session, 20 * session + 20):
            writer.thumbnail(sample, png + str(sample).encode())
        writer.close()
    found = open_log(location).thumbnails
    assert list(found) == list(range(40))
    assert found[33] == png + b"33"
    assert open_log(location).verify() == []
    with pytest.raises(LogError, match="expected a PNG of at most"):
        LogWriter(location, CONFIG).thumbnail(0, b"GIF89a")


def test_reading_a_log_and_scoring_it_need_no_torch(tmp_path: Path) -> None:
    LogWriter(tmp_path, CONFIG).close()
    code = (
        "import sys, diffhook; diffhook.open_log(sys.argv[1]); diffhook.influence; diffhook.outliers;"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
