"""Snapshots weigh the scores: every reader is told of one that was written and is not there any more."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from zarr.abc.store import Store
from zarr.storage import MemoryStore, WrapperStore

from diffhook.cli import main
from diffhook.log import LogWriter, Snapshot, open_log
from diffhook.log.compaction import compact, merge
from diffhook.log.table_writer import TableWriter
from diffhook.log.testing import CONFIG, DIM, some_rows

STEPS = (5, 9)


def write(location: Path | Store, start: int = 0, steps: tuple[int, ...] = STEPS) -> None:
    writer = LogWriter(location, CONFIG, start_step=start)
    writer.put("train", some_rows(8, 8 * start, step=start))
    for step in steps:
        assert writer.snapshot(Snapshot(step, 0.1, 0.5), b"%d" % step)
    writer.close()


def ask(location: Path, name: str = "asked") -> None:
    """A query set at all snapshots, as far as a reader of the log sees it."""
    log = open_log(location)
    table = TableWriter(log.writable_store(), f"queries/{name}/rank-0000", DIM, "float16")
    table.append(some_rows(4))
    table.flush()
    table.describe({"snapshots": [[s.step, s.session] for s in log.snapshots]})


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Of which the first snapshot is gone, at which queries had been asked."""
    write(tmp_path / "log")
    ask(tmp_path / "log")
    shutil.rmtree(tmp_path / "log/snapshots/step-00000005")
    return tmp_path / "log"


def test_a_reader_is_told_once_and_queries_that_were_asked_there_still_count(
    log: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = open_log(log)
    assert list(found.queries) == ["asked"], "influence looks no further"
    (told,) = [r.message for r in caplog.records]
    assert "snapshots that the run wrote are missing (1, at step 5)" in told
    assert [s.step for s in found.snapshots] == [9]
    assert len(caplog.records) == 1


def test_info_names_them(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(log), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["snapshots missing"] == [5]
    assert main(["info", str(log)]) == 0
    assert "snapshots missing" in capsys.readouterr().out


def test_verify_finds_them_and_a_repair_notes_the_loss(
    log: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    (line,) = open_log(log).verify()
    assert line == "snapshots/step-00000005: the run has written it, and it is gone"
    assert main(["verify", str(log)]) == 1
    caplog.clear()
    assert main(["verify", str(log), "--repair"]) == 0
    assert open_log(log).verify() == []
    assert [s.step for s in open_log(log).snapshots] == [9]
    assert list(open_log(log).queries) == ["asked"]
    assert caplog.records == []
    capsys.readouterr()
    assert main(["verify", str(log)]) == 0
    assert "snapshots/step-00000005 was gone when an earlier repair looked" in capsys.readouterr().out


def test_one_that_was_moved_aside_is_not_missing(log: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(log, 9, (12,))
    (log / "snapshots/step-00000012-session-1/parameters.safetensors").write_bytes(b"no weights")
    assert main(["verify", str(log), "--repair"]) == 0
    assert [s.step for s in open_log(log).snapshots] == [9]
    assert open_log(log).verify() == []
    assert caplog.records == []


def test_one_of_another_branch_is_missing_from_that_alone(log: Path) -> None:
    write(log, 4, (7,))
    assert open_log(log).index.missing_snapshots == []
    assert open_log(log, session=0).index.missing_snapshots == [5]
    assert len(open_log(log).verify()) == 1


def test_a_copy_lacks_what_the_log_lacks(log: Path, tmp_path: Path) -> None:
    compact(log, tmp_path / "copy", progress=False)
    assert open_log(tmp_path / "copy").index.missing_snapshots == [5]
    assert list(open_log(tmp_path / "copy").queries) == ["asked"]
    merge([tmp_path / "copy"], tmp_path / "merged", progress=False)
    assert open_log(tmp_path / "merged").index.missing_snapshots == [5]


class ShortListings(WrapperStore[Store]):
    """A network's store whose listings lack the snapshots."""

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        async for name in self._store.list_dir(prefix):
            if not name.startswith("step-"):
                yield name


def test_what_a_listing_lacks_is_asked_for_by_name(caplog: pytest.LogCaptureFixture) -> None:
    store = MemoryStore()
    write(store)
    write(store, 9, (12,))
    log = open_log(ShortListings(store))
    assert [(s.step, s.session, s.parameters()) for s in log.snapshots] == [
        (5, 0, b"5"), (9, 0, b"9"), (12, 1, b"12"),
    ]  # fmt: skip
    assert log.verify() == []
    assert caplog.records == []


def test_a_snapshot_that_a_kill_kept_from_being_noted_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TableWriter, "note_snapshots", lambda self, *steps: None)
    write(tmp_path / "log")
    assert [s.step for s in open_log(tmp_path / "log").snapshots] == list(STEPS)
    assert open_log(tmp_path / "log").verify() == []
