"""What people do to logs and with them that nobody has planned for."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from diffhook.capture import DiffusionObjective, Grid, Probe
from diffhook.cli import main
from diffhook.errors import LogError
from diffhook.log import LogWriter, Snapshot, open_log
from diffhook.log.testing import CONFIG, some_rows
from tests.log.test_lock import begin
from tests.runs import SCHEDULER, identified, train

LITTER = (".DS_Store", "Thumbs.db", "zarr.json~", "zarr (conflicted copy).json", ".zarr.json.Ab12C")


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffhook.log.table_writer.rows_per_shard", lambda dim, dtype: 16)


def write(path: Path, count: int = 40) -> Path:
    writer = LogWriter(path, CONFIG)
    writer.keep_names({0: "first.png"})
    writer.put("train", some_rows(count))
    writer.snapshot(Snapshot(5, 0.1, 0.1), b"weights")
    writer.alert({"step": 1, "kind": "test", "message": "…"})
    writer.close()
    return path


def test_what_desktops_and_syncers_leave_in_folders_is_no_part_of_a_log(tmp_path: Path) -> None:
    log = write(tmp_path / "log")
    for folder in [log, log / "queries", *(p for p in log.rglob("*") if p.is_dir())]:
        folder.mkdir(exist_ok=True)
        for name in LITTER:
            (folder / name).write_bytes(b"\x00")
    for command in (["info"], ["verify"], ["alerts"], ["compact", "--out", str(tmp_path / "copy")]):
        assert main([command[0], str(log), *command[1:]]) == 0
    assert len(open_log(tmp_path / "copy").train) == 40


@pytest.mark.parametrize("litter", [".DS_Store", ".ipynb_checkpoints", "lost+found"])
def test_a_folder_with_nothing_but_litter_is_empty(litter: str, tmp_path: Path) -> None:
    (tmp_path / litter).mkdir()
    write(tmp_path)
    assert len(open_log(tmp_path).train) == 40


def test_a_log_that_is_being_written_is_not_repaired(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run would find its log written by another, and end the capture."""
    chunk = write(tmp_path) / "train/rank-0000/loss/c/0"
    chunk.write_bytes(chunk.read_bytes()[:-1])
    run = begin(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert main(["verify", str(tmp_path), "--repair"]) == 2
    assert f"process {run.pid} is writing rank 0" in capsys.readouterr().err
    assert before == {p: p.read_bytes() for p in before}
    run.kill()
    run.wait()
    assert main(["verify", str(tmp_path), "--repair"]) == 0
    LogWriter(tmp_path, CONFIG).close()


def test_a_copy_made_while_the_log_was_written_costs_the_rows_that_it_lacks_and_no_others(
    tmp_path: Path,
) -> None:
    """Arrays' lengths and chunks are from before the mark."""
    log = write(tmp_path / "log", 32)
    shutil.copytree(log, tmp_path / "copy")
    writer = LogWriter(log, CONFIG, start_step=8)
    writer.put("train", some_rows(24, 32))
    writer.close()
    shutil.copy(log / "train/rank-0000/zarr.json", tmp_path / "copy/train/rank-0000/zarr.json")
    shutil.copytree(
        log / "train/rank-0000/sample", tmp_path / "copy/train/rank-0000/sample", dirs_exist_ok=True
    )
    found = open_log(tmp_path / "copy").verify()
    assert found
    assert all("rows 32 to 47 are lost" in line or "rows 48 to 55 are lost" in line for line in found)
    assert main(["verify", str(tmp_path / "copy"), "--repair"]) == 0
    assert open_log(tmp_path / "copy").train["sample"].tolist() == list(range(32))


def test_a_copy_inside_the_log_that_it_is_made_of_is_refused(tmp_path: Path) -> None:
    log = write(tmp_path / "log")
    (tmp_path / "latest").symlink_to(log)
    before = sorted(log.rglob("*"))
    for inside in (log / "copy", tmp_path / "latest/train/copy"):
        assert main(["compact", str(log), "--out", str(inside)]) == 2
    assert sorted(log.rglob("*")) == before


def probing(timesteps: int) -> dict[str, Any]:
    probe = Probe([0, 5, 9], Grid(timesteps), dataset=[(image,) for image in identified()])
    return {"probe": probe, "objective": DiffusionObjective(SCHEDULER), "projection_dim": 8, "epochs": 1}


def test_probes_of_another_grid_do_not_come_into_a_log(tmp_path: Path) -> None:
    """Queries share their noise with the probes of one grid, that of the log."""
    train(tmp_path / "log", **probing(2))
    with pytest.raises(LogError, match=r"probe\.grid\.timesteps: the log has 2, this run 3"):
        train(tmp_path / "log", **probing(3))
    train(tmp_path / "log", **probing(2))
    assert len(open_log(tmp_path / "log").sessions) == 2


def test_a_log_learns_of_its_grid_with_the_first_probes(tmp_path: Path) -> None:
    LogWriter(tmp_path, CONFIG).close()
    config = {**CONFIG, "probe": {"grid": {"timesteps": 3}}}
    LogWriter(tmp_path, config).close()
    LogWriter(tmp_path, CONFIG).close()
    assert open_log(tmp_path).config["probe"] == {"grid": {"timesteps": 3}}
    assert open_log(tmp_path).config["versions"] == CONFIG["versions"]


@pytest.mark.parametrize("session", ["0", 0.0, True, -1, 7])
def test_a_session_that_is_none_is_told(session: Any, tmp_path: Path) -> None:
    with pytest.raises(LogError, match="there is no session"):
        open_log(write(tmp_path), session=session)


@pytest.mark.parametrize("place", ["s3://", "s3://not a bucket/x"])
def test_a_place_that_a_networks_client_refuses_is_one_line(
    place: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert main(["info", place]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


WITHOUT_AN_END = """
import sys, threading
from diffhook.log import LogWriter
from diffhook.log.testing import CONFIG, some_rows
writer = LogWriter(sys.argv[1], CONFIG)
writer.put("train", some_rows(4))
writer.flush()
"""


def test_a_script_that_ends_without_closing_its_log_ends(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_AN_END, str(tmp_path)]
    assert subprocess.run(command, timeout=120, check=False).returncode == 0
    assert len(open_log(tmp_path).train) == 4
    assert json.loads((tmp_path / "zarr.json").read_text())


def test_a_log_that_was_moved_since_it_was_opened_makes_no_rows_up(tmp_path: Path) -> None:
    log = open_log(write(tmp_path / "log"))
    unread = open_log(tmp_path / "log")
    assert len(log.train) == 40
    (tmp_path / "log").rename(tmp_path / "moved")
    with pytest.raises(LogError, match=r"train/rank-0000/loss/c/0 is missing"):
        _ = log.train["loss"]
    for gone in (log.refresh, lambda: len(unread.train), lambda: unread.snapshots):
        with pytest.raises(LogError, match=r"no (diffhook )?log at"):
            gone()


def test_a_copied_rank_is_found(tmp_path: Path) -> None:
    log = write(tmp_path)
    shutil.copytree(log / "train/rank-0000", log / "train/rank-0001")
    assert open_log(log).verify() == [
        "train/rank-0001: all its rows are those of train/rank-0000, and count twice"
    ]


def test_training_rows_that_are_gone_as_a_whole_are_found(tmp_path: Path) -> None:
    log = write(tmp_path)
    shutil.rmtree(log / "train")
    assert open_log(log).verify() == ["train/rank-0000: all rows are lost: the whole rank is missing"]


def test_a_snapshot_in_a_folder_of_another_is_found_and_moved_aside(tmp_path: Path) -> None:
    log = write(tmp_path)
    shutil.copytree(log / "snapshots/step-00000005", log / "snapshots/step-00000099")
    with pytest.raises(LogError, match=r"step-00000099/snapshot.json is damaged: .*it is of step-00000005"):
        _ = open_log(log).snapshots
    assert main(["verify", str(log), "--repair"]) == 0
    assert [s.step for s in open_log(log).snapshots] == [5]
