"""Two live processes never write one rank of one log; the lock goes with the process that holds it."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffhook.errors import LogError
from diffhook.log import LogWriter, open_log
from diffhook.log.lock import query_lock
from diffhook.log.testing import CONFIG, some_rows
from tests.waiting import wait_until

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no fcntl")

ANOTHER_RUN = """
import sys
from diffhook.log import LogWriter
from diffhook.log.testing import CONFIG
writer = LogWriter(sys.argv[1], CONFIG, rank=int(sys.argv[2]))
print("writing", flush=True)
sys.stdin.read()
"""


def begin(location: Path, rank: int = 0) -> subprocess.Popen[str]:
    """Another process that has opened the log."""
    process = subprocess.Popen(
        [sys.executable, "-c", ANOTHER_RUN, str(location), str(rank)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


def test_a_second_run_into_a_log_that_is_being_written_is_refused(tmp_path: Path) -> None:
    other = begin(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(LogError, match=rf"process {other.pid} is writing rank 0 of the log at {tmp_path}: "):
        LogWriter(tmp_path, CONFIG)
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    LogWriter(tmp_path, CONFIG, rank=1).close()
    other.kill()
    other.wait()
    writer = LogWriter(tmp_path, CONFIG, start_step=3)
    writer.put("train", some_rows(5))
    writer.close()
    assert len(open_log(tmp_path).train) == 5


def test_a_writer_that_was_closed_lets_another_process_write(tmp_path: Path) -> None:
    LogWriter(tmp_path, CONFIG).close()
    other = begin(tmp_path)
    other.kill()
    other.wait()


def test_a_child_neither_holds_nor_loses_its_parents_lock(tmp_path: Path) -> None:
    """Workers of a DataLoader are forked while the log is open, and may outlive the run."""
    writer = LogWriter(tmp_path, CONFIG)
    child = os.fork()
    if child == 0:
        try:
            LogWriter(tmp_path, CONFIG)
        except LogError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    with pytest.raises(AssertionError):
        begin(tmp_path)
    writer.close()


def test_a_copy_that_the_run_makes_of_its_own_log_does_not_let_another_process_in(tmp_path: Path) -> None:
    """The lock file is opened and closed by whoever copies the folder."""
    writer = LogWriter(tmp_path / "log", CONFIG)
    shutil.copytree(tmp_path / "log", tmp_path / "copy")
    (tmp_path / "log/locks/rank-0000").read_bytes()
    with pytest.raises(AssertionError):
        begin(tmp_path / "log")
    LogWriter(tmp_path / "copy", CONFIG).close()
    writer.close()
    other = begin(tmp_path / "log")
    other.kill()
    other.wait()


def test_two_queries_of_one_name_are_not_computed_at_once(tmp_path: Path) -> None:
    store = LogWriter(tmp_path, CONFIG).store
    with query_lock(store, "mine"), query_lock(store, "another"):
        with pytest.raises(
            LogError, match=r"writing queries 'mine' .* already: wait for it, or choose another"
        ):
            query_lock(store, "mine").__enter__()
    with query_lock(store, "mine"):
        pass


@pytest.mark.parametrize(
    "make", [os.mkfifo, lambda path: os.symlink("/dev/null", path)], ids=["pipe", "link"]
)
def test_a_lock_that_is_no_file_is_refused(make: Callable[[Path], None], tmp_path: Path) -> None:
    (tmp_path / "locks").mkdir()
    make(tmp_path / "locks/rank-0000")
    with pytest.raises((LogError, OSError)):
        LogWriter(tmp_path, CONFIG)


def test_a_second_writer_in_one_process_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    first = LogWriter(tmp_path, CONFIG)
    with pytest.raises(LogError, match=r"this process is writing rank 0 .* already: close the earlier hook"):
        LogWriter(tmp_path, CONFIG)
    LogWriter(tmp_path, CONFIG, rank=1).close()
    first.close()
    second = LogWriter(tmp_path, CONFIG)
    first.close()
    with pytest.raises(LogError, match="already"):
        LogWriter(tmp_path, CONFIG)
    del second  # was never closed
    gc.collect()
    LogWriter(tmp_path, CONFIG).close()


def test_a_writer_that_was_given_up_ends_with_the_file_at_hand_and_locks_until_then(tmp_path: Path) -> None:
    """A disk that hangs, and comes back when the run is over."""
    writer = LogWriter(tmp_path, CONFIG)
    writer.flush()
    began, released = threading.Event(), threading.Event()

    def hang() -> None:
        began.set()
        released.wait(60)

    writer._submit(hang)
    wait_until(began.is_set)
    writer.record("later.json", {})
    with pytest.raises(LogError, match=r"nothing more was written for 0\.1 s"):
        writer.close(timeout=0.1)
    with pytest.raises(LogError, match="this process is writing rank 0"):
        LogWriter(tmp_path, CONFIG)
    released.set()
    wait_until(lambda: not writer._backlog._thread.is_alive())
    LogWriter(tmp_path, CONFIG).close()
    assert not (tmp_path / "later.json").exists()


def test_a_writer_whose_beginning_fails_in_us_lets_go_of_its_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = threading.Condition.wait_for

    def failing(condition: threading.Condition, *args: Any) -> bool:
        done = waiting(condition, *args)
        if threading.current_thread() is threading.main_thread():
            raise MemoryError("not today")
        return done

    monkeypatch.setattr(threading.Condition, "wait_for", failing)
    with pytest.raises(MemoryError) as caught:
        LogWriter(tmp_path, CONFIG)
    monkeypatch.undo()
    assert caught.tb is not None, "the half-made writer is alive"
    LogWriter(tmp_path, CONFIG).close()
