"""Commands go over the rows as they were told to, and hold no column of all rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from diffhook.analysis.execution import Execution
from diffhook.cli import main
from diffhook.log import Table
from tests.analysis.synthetic import SAMPLES, synthetic


@pytest.fixture
def log(tmp_path: Path) -> str:
    synthetic(tmp_path / "log", replicates=1)
    return str(tmp_path / "log")


def test_every_pass_of_the_report_takes_the_memory_it_may(
    log: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    passes: dict[str, int] = {}
    plain = Execution.compute

    def noting(self: Execution, task: Any, title: str = "") -> Any:
        passes[title] = self.memory
        return plain(self, task, title)

    monkeypatch.setattr(Execution, "compute", noting)
    page = tmp_path / "page.html"
    assert main(["report", log, "--queries", "new", "--memory", "0.25", "--out", str(page)]) == 0
    assert {"listing samples", "scoring rows", "scoring timesteps"} <= set(passes)
    assert set(passes.values()) == {250_000_000}
    assert main(["report", log, "--memory", "0", "--out", str(page)]) == 2
    assert "--memory is 0.0; expected a positive number of gigabytes" in capsys.readouterr().err
    assert main(["report", log, "--scheduler", "nowhere", "--out", str(page)]) == 2
    assert "no dask scheduler at nowhere" in capsys.readouterr().err


def test_info_counts_samples_without_a_column_of_all_rows(
    log: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(self: Table, column: str) -> Any:
        raise AssertionError(f"{column} was read of all rows")

    monkeypatch.setattr(Table, "__getitem__", refused)
    assert main(["info", log, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == len(SAMPLES)
