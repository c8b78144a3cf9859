"""Queries beside other processes: nothing is written over, and what no longer counts is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import diffhook
from diffhook.errors import LogError
from diffhook.log import RunLog, open_log
from diffhook.log import store as files
from diffhook.log.lock import query_lock
from tests.runs import SteppedTraining, TinyDenoiser, identified, probed


@pytest.fixture
def log(tmp_path: Path) -> RunLog:
    training = SteppedTraining(tmp_path / "log", strict=True, **probed())
    for step in range(4):
        training.step(step)
    training.accelerator.end_training()
    return open_log(tmp_path / "log")


def ask(log: RunLog, samples: torch.Tensor, **options: Any) -> Any:
    options = {
        "objective": probed()["objective"],
        "model": TinyDenoiser(),
        "grid": diffhook.Grid(1),
        **options,
    }
    return diffhook.query(log, (samples,), "q", **options)


def test_queries_that_another_process_finished_meanwhile_are_not_written_over(log: RunLog) -> None:
    """Both had opened the log before the first of them was done."""
    other = open_log(log.location)
    assert len(other.queries) == len(log.queries) == 0
    written = ask(log, identified()[:2])["grad_norm"].tolist()
    with pytest.raises(LogError, match="has queries 'q' already, from other samples"):
        ask(other, identified()[:3])
    assert ask(open_log(log.location), identified()[:2])["grad_norm"].tolist() == written


def test_queries_that_are_being_computed_are_not_computed_a_second_time(log: RunLog) -> None:
    with query_lock(log.writable_store(), "q"), pytest.raises(LogError, match="is writing queries 'q'"):
        ask(log, identified()[:2])
    assert len(ask(log, identified()[:2]))


def test_queries_at_snapshots_that_a_run_supersedes_meanwhile_say_so(log: RunLog, tmp_path: Path) -> None:
    class Interrupted(TinyDenoiser):
        """In whose first pass a run begins anew."""

        begun = False

        def forward(self, *args: Any, **options: Any) -> Any:
            if not Interrupted.begun:
                Interrupted.begun = True
                training = SteppedTraining(tmp_path / "log", strict=True, **probed())
                training.step(0)
                training.accelerator.end_training()
            return super().forward(*args, **options)

    with pytest.raises(LogError, match="computed at snapshots that a resumed run has superseded meanwhile"):
        ask(log, identified()[:2], model=Interrupted())
    assert len(open_log(tmp_path / "log").queries) == 0
    assert len(ask(open_log(tmp_path / "log"), identified()[:2])), "and can be asked again"


@pytest.mark.parametrize("files_left", [0, 1, 9])
def test_queries_whose_overwriting_was_cut_short_are_gone_and_harm_nobody(
    files_left: int, log: RunLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(log, identified()[:2])
    remove, left = files.remove, iter(range(files_left))

    def cut_short(*args: Any) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        remove(*args)

    monkeypatch.setattr(files, "remove", cut_short)
    with pytest.raises(KeyboardInterrupt):
        ask(log, identified()[:3], overwrite=True)
    monkeypatch.undo()
    found = open_log(log.location)
    assert len(found.queries) == 0
    assert found.verify() == []
    assert len(ask(found, identified()[:3])) == 3 * len(found.snapshots) * 2
