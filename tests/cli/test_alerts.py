"""``diffhook alerts``: what a person sees of a run, finished or not."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffhook.cli import main
from diffhook.log import LogWriter, open_log
from diffhook.log.following import follow_alerts
from diffhook.log.lock import release_rank
from tests.runs import identified, train

CONFIG = {"identity": {"projection": {"dim": 0, "seed": 0, "kind": "none"}, "parameters": [], "model": {}}}


def say(writer: LogWriter, step: int, time: float) -> None:
    alert = {"kind": "norm-outlier", "level": "warning", "samples": [step], "step": step, "time": time}
    writer.alert({**alert, "rank": writer.rank, "message": f"sample {step} [pulls] hard"})


def test_following_a_finished_run_shows_its_alerts_and_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = identified()
    data[6] = torch.nan
    train(tmp_path / "log", data=data, epochs=2, batch_size=12)
    capsys.readouterr()
    assert main(["alerts", str(tmp_path / "log"), "--follow"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("step 0  non-finite  sample 6 has a gradient that is not finite")
    assert main(["alerts", str(tmp_path / "log"), "--follow", "--json"]) == 0
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [a["samples"] for a in shown] == [[6], []]
    assert main(["alerts", str(tmp_path / "log"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == open_log(tmp_path / "log").alerts()


def test_ranks_are_merged_in_time_and_the_last_to_end_ends_it(tmp_path: Path) -> None:
    first, second = (LogWriter(tmp_path / "log", CONFIG, rank=rank) for rank in (0, 1))
    say(first, 1, 10.0)
    say(second, 2, 9.0)
    say(first, 3, 8.0)
    first.flush()
    second.flush()
    looks = follow_alerts(open_log(tmp_path / "log"), interval=0)
    assert [a["step"] for a in next(looks)] == [3, 2, 1]
    first.close()
    assert next(looks) == [], "one rank still trains"
    say(second, 4, 11.0)
    second.close()
    assert [a["rank"] for a in next(looks)] == [1]
    assert list(looks) == []


def test_a_run_that_was_taken_up_again_is_followed_to_its_new_end(tmp_path: Path) -> None:
    first = LogWriter(tmp_path / "log", CONFIG)
    say(first, 3, 0.0)
    first.close()
    again = LogWriter(tmp_path / "log", CONFIG, start_step=5)
    say(again, 6, 1.0)
    again.flush()
    looks = follow_alerts(open_log(tmp_path / "log"), interval=0)
    assert [a["step"] for a in next(looks)] == [3, 6], "and the end of the first session is not its end"
    again.close()
    assert list(looks) == [[]]


def test_processes_that_a_resumed_run_does_not_have_any_more_are_not_waited_for(tmp_path: Path) -> None:
    for rank in (0, 1):  # as if killed: no end
        writer = LogWriter(tmp_path / "log", CONFIG, rank=rank)
        say(writer, 3, 0.0)
        writer.flush()
        release_rank(writer.store, rank, writer)
    again = LogWriter(tmp_path / "log", CONFIG, start_step=2)
    say(again, 2, 1.0)
    again.close()
    assert [[a["rank"] for a in look] for look in follow_alerts(open_log(tmp_path / "log"), interval=0)]


def test_ctrl_c_ends_it_cleanly(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path / "log", CONFIG)
    say(writer, 1, 1.0)
    writer.flush()
    command = [sys.executable, "-m", "diffhook", "alerts", str(tmp_path / "log"), "--follow"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:
        try:
            assert process.stdout is not None
            assert "sample 1 [pulls] hard" in process.stdout.readline()
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0
    assert errors == ""
    writer.close()
