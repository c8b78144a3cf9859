"""Wrong labels from neighbours in projection space, against all pairs written out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import diffhook
from diffhook.analysis import label_neighbours as module
from diffhook.analysis.execution import Execution
from diffhook.analysis.fisher import combined
from diffhook.cli import main
from tests.analysis.test_outliers import COUNT, DIM, made_log


def slow(log: diffhook.RunLog, labels: list[int]) -> np.ndarray:
    table = log.train
    sums = np.zeros((COUNT, DIM))
    usable = np.isfinite(table["grad_norm"])
    np.add.at(sums, table["sample"][usable], table["projection"][usable].astype(float))
    rows = table["projection"][usable].astype(float)
    moment = rows.T @ rows / len(rows)
    kernel = np.linalg.inv(moment + 0.03 * np.trace(moment) / DIM * np.eye(DIM))
    products = sums @ kernel @ sums.T
    lengths = np.sqrt(np.diag(products))
    found = np.full(COUNT, np.nan)
    for i in range(COUNT):
        cosines = {j: products[i, j] / lengths[i] / lengths[j] for j in range(COUNT) if j != i}
        same = sorted((c for j, c in cosines.items() if labels[j] == labels[i]), reverse=True)
        other = sorted((c for j, c in cosines.items() if labels[j] != labels[i]), reverse=True)
        found[i] = np.mean(other[:10]) - np.mean(same[:10])
    return found


@pytest.mark.parametrize("memory", [1 << 30, 1 << 12])
def test_scores_are_those_of_all_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: int) -> None:
    monkeypatch.setattr(module, "_TILE", 16)
    log = made_log(tmp_path / "log")
    labels = [i % 3 for i in range(COUNT)]
    ranking = diffhook.outliers(log, signals=["label"], labels=labels, execution=Execution(memory=memory))
    expected = combined([slow(log, labels)])  # a probability
    finite = np.isfinite(ranking.scores)
    np.testing.assert_allclose(
        ranking.signals["label"][finite], expected[ranking.sample_ids[finite]], rtol=1e-4, atol=1e-5
    )
    assert (np.diff(ranking.scores[finite]) <= 0).all()


def test_the_command_line_takes_labels_from_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made_log(tmp_path / "log")
    (tmp_path / "labels.txt").write_text("".join(f"{'ab'[i % 2]}\n" for i in range(COUNT)))
    command = ["outliers", str(tmp_path / "log"), "--by", "label", "--labels", str(tmp_path / "labels.txt")]
    assert main([*command, "--json"]) == 0
    assert "outliers: label (train rows)" in capsys.readouterr().out
