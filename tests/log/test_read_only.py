"""A log that may be read and not written to: of a colleague, or on a file system that is read-only."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from zarr.storage import MemoryStore

import diffhook
from diffhook.capture import Grid
from diffhook.errors import LogError
from diffhook.log import LogWriter, Snapshot, open_log
from diffhook.log.testing import CONFIG, some_rows
from tests.log.faults import FaultyStore, fails, sound
from tests.runs import TinyDenoiser, identified, probed, train
from tests.waiting import wait_until

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no permissions of this kind")

COMMANDS = (
    ["info"], ["verify"], ["verify", "--repair"], ["alerts"], ["outliers"], ["bias"],
    ["influence", "--queries", "asked"], ["report", "--out", "report.html"], ["compact", "--out", "copy"],
)  # fmt: skip

QUESTION = {"objective": probed()["objective"], "model": TinyDenoiser(), "grid": Grid(1)}

ALL = """
import contextlib, io, json, sys
from diffhook.cli import main
told = {}
for command in json.loads(sys.argv[1]):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        told[" ".join(command)] = main(command), out.getvalue()
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With probes and queries."""
    path = tmp_path_factory.mktemp("whole") / "log"
    train(path, epochs=2, projection_dim=16, **probed())
    diffhook.query(open_log(path), (identified()[:2],), "asked", **QUESTION)
    return path


@pytest.fixture
def log(whole: Path, tmp_path: Path) -> Iterator[Path]:
    """The same; nobody may write there."""
    path = shutil.copytree(whole, tmp_path / "log")
    _allow(path, 0o555, 0o444)
    yield path
    _allow(path, 0o755, 0o644)


def _allow(path: Path, folders: int, files: int) -> None:
    path.chmod(0o755)
    for found in [*path.rglob("*"), path]:
        found.chmod(folders if found.is_dir() else files)


def _obey_permissions() -> None:
    """Root is held to them without two of its capabilities."""
    if os.geteuid() == 0:
        for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
            ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


def run(commands: list[list[str]], folder: Path) -> dict[str, tuple[int, str]]:
    """Command → exit status and output, as of somebody whom permissions concern."""
    finished = subprocess.run(
        [sys.executable, "-c", ALL, json.dumps(commands)], preexec_fn=_obey_permissions, cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    told: dict[str, tuple[int, str]] = json.loads(finished.stdout.splitlines()[-1])
    return told


def test_every_reader_works_on_a_log_that_cannot_be_written(log: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in log.rglob("*")}
    told = run([[name, str(log), *options] for name, *options in COMMANDS], tmp_path)
    assert {command: said for command, (status, said) in told.items() if status} == {}
    assert {path: path.stat().st_mtime_ns for path in log.rglob("*")} == before
    assert len(open_log(tmp_path / "copy").train) == len(open_log(log).train)


def test_who_would_write_there_is_told_what_is_needed(log: Path, tmp_path: Path) -> None:
    (log / "alerts").chmod(0o755)
    (log / "alerts/rank-0000.jsonl").write_bytes(b"damaged")
    (log / "alerts").chmod(0o555)
    told = run([["verify", str(log), "--repair"]], tmp_path)
    ((status, said),) = told.values()
    assert status == 2
    assert "cannot write a log at" in said
    assert "Make it writable, or use another place or a copy of it" in said


def test_a_part_that_may_not_be_read_is_no_damage(whole: Path, tmp_path: Path) -> None:
    """As of a colleague whose files others may not read."""
    parts = {"samples": "train/rank-0000/sample/c", "snapshots": "snapshots", "probes": "probe"}
    for copy, part in parts.items():
        shutil.copytree(whole, tmp_path / copy)
        (tmp_path / copy / part).chmod(0)
    told = run([c for copy in parts for c in (["verify", copy, "--repair"], ["info", copy])], tmp_path)
    for command, (status, said) in told.items():
        assert status == 2
        assert "Permission denied" in said
        assert parts[command.split()[1]] in said
    for copy, part in parts.items():
        (tmp_path / copy / part).chmod(0o755)
        assert open_log(tmp_path / copy).verify() == []


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_a_store_that_is_read_only_at_the_opening_refuses_at_once(code: int) -> None:
    memory = MemoryStore()
    store = FaultyStore(memory)
    store.fault = fails(code)
    with pytest.raises(
        LogError, match=rf"cannot write a log at .*{errno.errorcode[code]}.* Make it writable"
    ):
        LogWriter(store, CONFIG)
    assert not memory._store_dict


def test_a_file_system_that_becomes_read_only_is_waited_for_and_nothing_is_lost(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The kernel mounts it so after an error; it may be mounted anew."""
    store = FaultyStore(MemoryStore())
    writer = LogWriter(store, CONFIG)
    writer.put("train", some_rows(8))
    writer.flush()
    store.fault = fails(errno.EROFS)
    writer.put("train", some_rows(8, 8))
    assert writer.snapshot(Snapshot(4, 0.1, 0.1), b"weights")
    wait_until(lambda: writer.failing)
    assert open_log(store).train["sample"].tolist() == list(range(8))
    store.fault = sound
    writer.close()
    assert open_log(store).train["sample"].tolist() == list(range(16))
    assert open_log(store).verify() == []
    assert "keeps trying, and training goes on" in caplog.text


def test_queries_of_a_log_that_cannot_be_written_are_refused_before_they_are_computed(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> int:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("diffhook.log.lock._open", refuse)
    monkeypatch.setattr("diffhook.queries.query._answer", lambda *_: pytest.fail("computed"))
    with pytest.raises(
        LogError, match=r"Read-only file system. Make it writable, or use another place or a copy"
    ):
        diffhook.query(open_log(whole), (identified()[:2],), "others", **QUESTION)
