"""`diffhook influence`: what it prints and writes with error bars, and without."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

import diffhook
from diffhook.cli import main
from tests.analysis.synthetic import SAMPLES, synthetic


@pytest.mark.parametrize("opponents", [False, True])
def test_error_bars_and_stability_are_shown_where_noise_was_drawn_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], opponents: bool
) -> None:
    made = synthetic(tmp_path / "log", replicates=3)
    scores = diffhook.influence(made.log, "new", source="probe")
    expected = scores.certainty(scores.top(3, opponents=opponents), opponents=opponents)
    assert expected is not None
    command = ["influence", str(tmp_path / "log"), "--queries", "new", "--source", "probe", "--top", "3"]
    command += ["--opponents"] if opponents else []
    assert main([*command, "--json", "--csv", str(tmp_path / "all.csv")]) == 0
    found = json.loads(capsys.readouterr().out)["queries"]
    np.testing.assert_array_equal(np.float32([q["errors"] for q in found]), expected.errors)
    np.testing.assert_array_equal([q["stability"] for q in found], expected.stability)
    np.testing.assert_array_equal([q["beyond_noise"] for q in found], expected.beyond)
    with open(tmp_path / "all.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * len(SAMPLES)
    assert all(float(row["error"]) > 0 for row in rows)
    assert main(command) == 0
    shown = capsys.readouterr().out
    header = next(line for line in shown.splitlines() if "rank" in line)
    assert header.split() == ["query", "rank", "sample", "score", "error"]
    assert "one standard error over other draws of noise" in shown
    assert f"{expected.beyond[0].sum()} of 3" in shown
    assert shown.count("within noise") == (~expected.beyond).sum()
    assert "share that stays" in shown


def test_without_replicates_there_are_none_and_it_says_how_to_get_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    synthetic(tmp_path / "log", replicates=1)
    command = ["influence", str(tmp_path / "log"), "--queries", "new"]
    assert main([*command, "--json", "--csv", str(tmp_path / "all.csv")]) == 0
    (first, *_) = json.loads(capsys.readouterr().out)["queries"]
    assert set(first) == {"query", "samples", "scores"}
    assert (tmp_path / "all.csv").read_text().startswith("query,rank,sample,score\n")
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "No errors: noise was drawn once on the grid (diffhook query --replicates 2)" in shown
    assert "beyond noise" not in shown
