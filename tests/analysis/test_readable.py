"""What one sees of a result in a terminal: short, named, and right."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

import diffhook
from diffhook import words
from diffhook.analysis import BiasReport, Neighbours, Ranking, Top
from diffhook.analysis.bias import Generality, TimestepBin
from diffhook.log import RunLog
from tests.report.logs import write_log


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> RunLog:
    return write_log(tmp_path_factory.mktemp("readable") / "log", 64)


def test_a_ranking_lists_its_first_samples(log: RunLog) -> None:
    ranking = diffhook.outliers(log)
    lines = repr(ranking).splitlines()
    assert lines[0] == f"Ranking of 64 samples: {ranking.title}"
    assert lines[1].split() == ["rank", "sample", "score", "reasons"]
    assert lines[2].split()[:3] == ["1", "7", "∞"]
    assert len(lines) == 13
    assert lines[-1] == "… and 54 more"
    assert max(map(len, lines)) < 120


def test_an_empty_ranking_says_so() -> None:
    empty = Ranking(np.array([], np.int64), np.array([]), (), "outliers: norm")
    assert repr(empty) == "Ranking of 0 samples: outliers: norm\nnothing"


def test_names_stand_where_samples_have_them() -> None:
    ranking = Ranking(np.array([5, 6]), np.array([2.0, 1.0]), ((), ("loud",)), "t", names={5: "cat/a.png"})
    assert "   1  cat/a.png      2" in repr(ranking)
    assert "   2  6              1  loud" in repr(ranking)


def test_scores_are_not_computed_to_be_looked_at(log: RunLog) -> None:
    scores = diffhook.influence(log, "held-out", "retrac")
    assert repr(scores) == (
        "<Scores of 6 queries × 64 samples by retrac, train rows; computed when asked for: .top(k), .values>"
    )
    assert "values" not in vars(scores)
    assert scores.values.shape == (6, 64)
    assert "values are there" in repr(scores)


def test_a_top_names_its_queries_and_samples(log: RunLog) -> None:
    top = diffhook.influence(log, "held-out", "retrac").top(2)
    lines = repr(top).splitlines()
    assert lines[0] == "Top 2 of 6 queries"
    first = f"{top.sample_ids[0, 0]} ({top.scores[0, 0]:+.2g})".replace("-", "−")
    assert lines[2].split(None, 1)[0] == str(top.query_ids[0])
    assert first in lines[2]
    names = {3: "a/b-1.png", 4: "a/c.png"}
    named = Top(np.array([[3]]), np.array([[-0.5]], np.float32), np.array([9]), names)
    assert repr(named).splitlines()[-1] == "    9  b-1.png (−0.5)"


def test_neighbours_list_each_close_pair_once() -> None:
    found = Neighbours(
        np.arange(4), np.array([1, 0, 3, 2]), np.array([0.9, 0.9, 0.99, np.nan], np.float32), {2: "b.png"}
    )
    assert found.closest(5) == [(2, 3, pytest.approx(0.99)), (0, 1, pytest.approx(0.9))]
    assert found.closest(1) == [(2, 3, pytest.approx(0.99))]
    lines = repr(found).splitlines()
    assert lines[0] == "Neighbours of 4 samples, the closest pairs"
    assert lines[2].split() == ["b.png", "3", "0.990"]


def test_a_bias_report_is_a_table() -> None:
    report = BiasReport(
        "train", [TimestepBin(0, 500, 1200, 2.0, 1, 3), TimestepBin(500, 999, 1200, 0.5, 0.1, 1)], -0.7, 0.0,
        [Generality("held-out", "tracin", "train", 10, 0.25, 3, 0.5)],
    )  # fmt: skip
    text = repr(report)
    assert "rank correlation of timestep and gradient norm −0.70, p < 0.001" in text
    assert "0 – 500    1,200            2" in text
    assert "held-out  tracin   10         0.25                      3" in text


def test_what_a_repr_shows_cannot_command_a_terminal() -> None:
    ranking = Ranking(np.array([5]), np.array([2.0]), (("\x1b[2J",),), "t", names={5: "a\nb\x1b.png"})
    assert "\x1b" not in repr(ranking)
    assert len(repr(ranking).splitlines()) == 3


def test_results_travel_between_processes(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", 32)
    for made in (diffhook.outliers(log), diffhook.influence(log, "held-out").top(3)):
        assert repr(pickle.loads(pickle.dumps(made))) == repr(made)


def test_a_path_serves_wherever_a_log_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = write_log(tmp_path / "log", 32)
    monkeypatch.setenv("HOME", str(tmp_path))
    for place in (tmp_path / "log", str(tmp_path / "log"), "~/log"):
        assert repr(diffhook.outliers(place)) == repr(diffhook.outliers(log))
        assert repr(diffhook.self_influence(place)) == repr(diffhook.self_influence(log))
        assert repr(diffhook.near_duplicates(place, "train")) == repr(diffhook.near_duplicates(log, "train"))
        assert repr(diffhook.bias(place)) == repr(diffhook.bias(log))
        top = diffhook.influence(place, "held-out").top(3)
        assert repr(top) == repr(diffhook.influence(log, "held-out").top(3))
        assert diffhook.influence_by_timestep(place, "held-out", top.sample_ids).values.shape == (6, 3, 20)


def test_a_table_lines_up_and_cuts_what_is_long() -> None:
    text = words.table(("name", "n"), [("a", "1,200"), ("b" * 30, "–")], longest=10)
    assert text.splitlines() == ["name            n", "a           1,200", "bbbbbbbbb…      –"]
