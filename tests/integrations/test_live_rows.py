"""Rows of a live run that a reader does not see yet are told, with what makes them count."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

import diffhook
from diffhook.analysis.execution import Execution
from diffhook.errors import LogError
from diffhook.report import write_page
from tests.runs import SteppedTraining


def test_before_the_first_flush_the_error_says_what_to_do(tmp_path: Path) -> None:
    training = SteppedTraining(tmp_path / "log")
    for step in range(3):
        training.step(step)
    with pytest.raises(LogError, match=r"has no train rows yet; 12 are in memory: call hook\.flush\(\)"):
        diffhook.outliers(tmp_path / "log")
    training.hook.flush()
    seen = diffhook.open_log(tmp_path / "log").train["sample"]
    assert len(seen) == 12
    assert sorted(diffhook.outliers(tmp_path / "log").sample_ids) == sorted(set(seen.tolist()))
    training.hook.close()


def test_rows_since_the_last_flush_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    training = SteppedTraining(tmp_path / "log")
    training.step(0)
    training.step(1)
    training.hook.flush()
    with caplog.at_level(logging.WARNING, "diffhook"):
        diffhook.outliers(tmp_path / "log")
        assert "still in memory" not in caplog.text
        training.step(2)
        diffhook.outliers(tmp_path / "log")
        assert f"4 rows of {tmp_path / 'log'} are still in memory and do not count: call hook.flush()" in (
            caplog.text
        )
        caplog.clear()
        write_page(tmp_path / "page.html", tmp_path / "log", queries={}, execution=Execution(progress=False))
        assert caplog.text.count("still in memory") == 1, "a page asks often, of one look"
        caplog.clear()
        training.hook.close()
        diffhook.outliers(tmp_path / "log")
        assert caplog.text == ""
