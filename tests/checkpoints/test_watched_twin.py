"""Checkpoints measured afterwards give what watching the training gave: rows, scores, rankings, the page."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import diffhook
from diffhook.log import RunLog, Table
from tests.runs import SCHEDULER, SteppedTraining, TinyDenoiser, identified

OBJECTIVE = diffhook.DiffusionObjective(SCHEDULER)
GRID = diffhook.Grid(3, replicates=2)
DATA = [(image,) for image in identified(24)]
EXACT = ("timestep", "replicate", "noise_seed", "lr", "weight")


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log of a run with probes of all samples, and accelerate's checkpoints beside it."""
    root = tmp_path_factory.mktemp("watched")
    probe = diffhook.Probe(None, GRID, dataset=DATA)
    training = SteppedTraining(root / "log", probe=probe, objective=OBJECTIVE, strict=True)
    for number in range(6):
        training.step(number)
        if number % 2:
            training.accelerator.save_state(str(root / f"checkpoint-{number + 1}"))
    training.accelerator.end_training()
    return root


def by_row(table: Table) -> dict[str, np.ndarray]:
    order = np.lexsort([table[name] for name in ("noise_seed", "sample", "step")])
    return {name: table[name][order] for name in table.columns}


def assert_same_rows(found: RunLog, expected: RunLog) -> None:
    one, other = by_row(found.probe), by_row(expected.probe)
    assert len(one["sample"]) == 3 * len(DATA) * GRID.rows
    for name in ("step", "sample", *EXACT):
        np.testing.assert_array_equal(one[name], other[name], name)
    for name in ("loss", "grad_norm", "input_mean"):
        np.testing.assert_allclose(one[name], other[name], rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(one["projection"], other["projection"], atol=5e-4)  # float16 on the disk


@pytest.mark.parametrize("where", ["log/snapshots/*", "checkpoint-*"])
def test_rows_and_scores_are_those_of_the_watched_run(watched: Path, tmp_path: Path, where: str) -> None:
    expected = diffhook.open_log(watched / "log")
    found = diffhook.from_checkpoints(
        TinyDenoiser(), str(watched / where), DATA, OBJECTIVE, tmp_path / "log",
        probe=diffhook.Probe(None, GRID), train_batch_size=4, projection_dim=16,
    )  # fmt: skip
    assert [s.step for s in found.snapshots] == [2, 4, 6]
    assert_same_rows(found, expected)
    for log in (found, expected):
        diffhook.query(log, (identified(3),), "asked", OBJECTIVE, model=TinyDenoiser(), against="probe")
    for method in ("whitened-retrac", "tracin"):
        one, other = (
            diffhook.influence(log, "asked", method, source="probe").values for log in (found, expected)
        )
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4 * np.abs(other).max())
    ranking = diffhook.outliers(found)
    assert sorted(ranking.sample_ids.tolist()) == list(range(len(DATA)))
    assert {"input", "loss"} <= ranking.signals.keys()
    assert found.verify() == []
