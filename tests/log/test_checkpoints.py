"""Real trainings that are resumed: which rows count is told by the checkpoint, however odd its file is."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import diffhook
from diffhook.capture import Grid
from diffhook.capture.loop.run.checkpoint import Position, read_state, write_state
from diffhook.integrations.accelerate import DiffHook
from diffhook.log import open_log
from tests.runs import SteppedTraining, TinyDenoiser, identified, probed


def sit(folder: Path, *, resume: int = 0, stop: int, save: tuple[int, ...] = ()) -> DiffHook:
    """One process's life, with probes of three samples."""
    training = SteppedTraining(folder / "log", strict=True, **probed())
    if resume:
        training.resume(folder / f"at-{resume}")
    for step in range(resume, stop):
        training.step(step)
        if step + 1 in save:
            training.accelerator.save_state(str(folder / f"at-{step + 1}"))
    training.accelerator.end_training()
    return training.hook


def rows(folder: Path, table: str = "train") -> Counter[tuple[Any, ...]]:
    found = getattr(open_log(folder / "log"), table)
    columns = [found[name].tolist() for name in ("step", "sample", "timestep", "lr", "weight", "grad_norm")]
    return Counter(zip(*columns, strict=True))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was left alone."""
    folder = tmp_path_factory.mktemp("whole")
    sit(folder, stop=12, save=(3, 6, 9))
    return folder


def test_probes_of_the_checkpoints_own_step_are_those_of_a_run_that_never_stopped(
    whole: Path, tmp_path: Path
) -> None:
    """With their weight: the learning rates since the snapshot before."""
    sit(tmp_path, stop=8, save=(3, 6))
    sit(tmp_path, resume=6, stop=12, save=(9,))
    kept = rows(tmp_path, "probe")
    assert kept == rows(whole, "probe")
    assert {step for step, *_ in kept} == {3, 6, 9, 12}
    assert rows(tmp_path) == rows(whole)


def test_a_run_of_one_checkpoint_a_session_keeps_all_probes(whole: Path, tmp_path: Path) -> None:
    for start in (0, 3, 6, 9):
        sit(tmp_path, resume=start, stop=start + 3, save=(start + 3,))
    assert rows(tmp_path, "probe") == rows(whole, "probe")
    assert rows(tmp_path) == rows(whole)


def test_a_wrong_checkpoint_and_the_right_one_again_give_the_run_that_never_stopped(
    whole: Path, tmp_path: Path
) -> None:
    sit(tmp_path, stop=9, save=(3, 9))
    sit(tmp_path, resume=3, stop=4)
    sit(tmp_path, resume=9, stop=12)
    assert rows(tmp_path) == rows(whole)
    assert len(open_log(tmp_path / "log").sessions) == 3


def test_queries_at_snapshots_that_a_resume_superseded_do_not_count_and_others_do(tmp_path: Path) -> None:
    sit(tmp_path, stop=6, save=(3, 6))
    log = open_log(tmp_path / "log")
    ask = {"objective": probed()["objective"], "model": TinyDenoiser(), "grid": Grid(1)}
    diffhook.query(log, (identified()[:2],), "before", **ask)
    assert list(log.queries) == ["before"], "the log that was asked knows the answer"
    sit(tmp_path, resume=6, stop=12)
    assert list(open_log(tmp_path / "log").queries) == ["before"]
    sit(tmp_path, resume=3, stop=4)
    assert list(open_log(tmp_path / "log").queries) == []


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b'{"step": 1e30}', b'{"step": -7}', b'{"step": "5"}', b'{"step": true}', b"[]", b"null",
        b'{"step": 5, "lr_sum": "x"}', b'{"step": 5, "lr_sum": NaN}', b'{"step": 5, "session": 7}',
        b'{"step": 99999999999999999999}', b"\xff\xfe", b"[" * 60_000, b" " * 100_000,
    ],
    ids=lambda content: repr(content[:24]),
)  # fmt: skip
def test_an_absurd_file_in_a_checkpoint_is_told_and_taken_for_none(
    content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "diffhook.json").write_bytes(content)
    assert read_state(tmp_path) == {}
    (told,) = caplog.records
    assert told.levelno == logging.WARNING
    assert "diffhook.json cannot be used (" in told.message


def test_capture_goes_on_from_a_checkpoint_whose_file_is_damaged(
    whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sit(tmp_path, stop=6, save=(3, 6))
    (tmp_path / "at-6/diffhook.json").write_text('{"step": 1e30}')
    sit(tmp_path, resume=6, stop=12)
    assert "expected a number of optimiser steps" in caplog.text
    assert rows(tmp_path) == rows(whole), "Adam knows how many steps it has taken"


def test_a_checkpoints_file_is_there_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = Position(5, 0.5, "abc").to_json()
    write_state(tmp_path, state)
    assert Position.from_json(read_state(tmp_path)) == Position(5, 0.5, "abc")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_state(tmp_path, Position(9, 0.9, "abc").to_json())
    assert json.loads((tmp_path / "diffhook.json").read_text()) == state
    assert [p.name for p in tmp_path.iterdir()] == ["diffhook.json"]


def _say(folder: Path, at: int, **other: Any) -> None:
    """Have the file of a checkpoint say something else."""
    path = folder / f"at-{at}/diffhook.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **other}))


@pytest.mark.parametrize("step", [2, 4, 900])
def test_where_the_optimiser_contradicts_a_checkpoints_file_it_is_believed_and_that_is_told(
    step: int, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file of another checkpoint, or one that a save without us has left where it was."""
    sit(tmp_path, stop=8, save=(3, 6))
    _say(tmp_path, 6, step=step)
    caplog.clear()
    sit(tmp_path, resume=6, stop=12, save=(9,))
    (told,) = [r.message for r in caplog.records if r.levelno >= logging.WARNING]
    assert (
        f"says that {step} optimiser steps were taken, but the optimiser that was loaded has taken 6" in told
    )
    assert rows(tmp_path) == rows(whole), "none is lost, and none is there twice"


def test_a_file_of_a_later_session_leads_through_its_ancestors(whole: Path, tmp_path: Path) -> None:
    """Copied from a checkpoint of a branch that left later, into one of before."""
    sit(tmp_path, stop=9, save=(3, 6, 9))
    sit(tmp_path, resume=9, stop=11, save=(11,))
    sit(tmp_path, resume=3, stop=4)
    (tmp_path / "at-6/diffhook.json").write_bytes((tmp_path / "at-11/diffhook.json").read_bytes())
    sit(tmp_path, resume=6, stop=12)
    assert rows(tmp_path) == rows(whole)


def test_an_optimiser_that_was_made_anew_contradicts_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its count lacks what was before, which the next checkpoint remembers."""
    sit(tmp_path, stop=6, save=(6,))
    for folder in (tmp_path / "at-6").glob("optimizer*"):
        state = torch.load(folder)
        torch.save({**state, "state": {}}, folder)
    sit(tmp_path, resume=6, stop=9, save=(9,))
    assert Position.from_json(read_state(tmp_path / "at-9")).uncounted == 6
    sit(tmp_path, resume=9, stop=12)
    assert not [r for r in caplog.records if "optimiser steps were taken" in r.message]
    assert sorted({step for step, *_ in rows(tmp_path)}) == list(range(12))
