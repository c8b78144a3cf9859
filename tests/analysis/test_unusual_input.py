"""Samples that look unlike the others are ranked by that, from what the log has of their looks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import diffhook
from diffhook.appearance import COLUMNS
from diffhook.errors import ConfigurationError
from diffhook.log import LogWriter
from tests.analysis.synthetic import config

COUNT, VISITS, BRIGHT, FLAT = 80, 3, 7, 11


def made_log(path: Path, figures: np.ndarray, ids: np.ndarray) -> diffhook.RunLog:
    """Every visit shows a sample a little otherwise, as augmentation does. ``figures``: (visits, N, 3)."""
    described = config()
    described["identity"]["projection"] = {"dim": 0, "seed": 0, "kind": "none"}
    rng = np.random.default_rng(0)
    writer = LogWriter(path, described)
    for step, shown in enumerate(figures):
        count = len(ids)
        scalars = {
            "timestep": rng.integers(1, 1000, count),
            "loss": rng.random(count),
            "weight": np.ones(count),
        }
        rows = {name: values.astype(np.float32) for name, values in scalars.items()}
        rows |= dict(zip(COLUMNS, shown.T.astype(np.float32), strict=True))
        rows |= {"sample": ids, "step": np.full(count, step), "noise_seed": np.full(count, -1)}
        rows |= {"lr": np.full(count, 0.1, np.float32), "grad_norm": np.exp(rng.normal(0, 0.1, count))}
        writer.put("train", rows)
    writer.close()
    return diffhook.open_log(path)


@pytest.fixture
def figures() -> np.ndarray:
    rng = np.random.default_rng(1)
    own = np.stack([rng.normal(-0.5, 0.2, COUNT), *np.exp(rng.normal(-1, 0.2, (2, COUNT)))], 1)
    own[BRIGHT, 0] = 0.9
    own[FLAT, 1:] /= 50
    return own + rng.normal(0, 1e-3, (VISITS, COUNT, 3))


def slow_distances(figures: np.ndarray) -> np.ndarray:
    """One sample at a time, in float64."""
    mean = figures.astype(np.float32).astype(float).mean(0)
    scale = np.array([[m, np.log(max(c, 1e-6)), np.log(max(r, 1e-6))] for m, c, r in mean])
    low, middle, high = (np.quantile(scale, q, axis=0) for q in (0.1, 0.5, 0.9))

    def deviation(value: float, figure: int) -> float:
        side = low if value < middle[figure] else high
        return (value - middle[figure]) / (abs(middle[figure] - side[figure]) / 1.2816)

    off = np.array([[deviation(value, figure) for figure, value in enumerate(row)] for row in scale])
    usual = sum(np.outer(r, r) for r in off.clip(-3, 3)) / len(off) + 1e-3 * np.eye(3)
    return np.array([np.sqrt(row @ np.linalg.inv(usual) @ row) for row in off])


def test_distances_are_those_of_the_slow_way_and_the_odd_come_first_with_words(
    tmp_path: Path, figures: np.ndarray
) -> None:
    ids = np.random.default_rng(2).permutation(COUNT) + 100
    ranking = diffhook.outliers(made_log(tmp_path / "log", figures, ids), signals=["input"])
    found = dict(zip(ranking.sample_ids.tolist(), ranking.signals["input"], strict=True))
    np.testing.assert_allclose([found[i] for i in ids.tolist()], slow_distances(figures), rtol=1e-4)
    assert set(ranking.sample_ids[:2]) == {ids[BRIGHT], ids[FLAT]}
    flags = dict(zip(ranking.sample_ids.tolist(), ranking.reasons, strict=True))
    assert flags[ids[BRIGHT]][0].startswith("looks unlike the others: its mean is 0.901, that of 98% of them")
    assert "its contrast is 0.00" in flags[ids[FLAT]][0] or "its roughness is 0.00" in flags[ids[FLAT]][0]
    assert sum(bool(said) for said in flags.values()) <= 3


def test_looks_are_one_signal_among_the_others(tmp_path: Path, figures: np.ndarray) -> None:
    log = made_log(tmp_path / "log", figures, np.arange(COUNT))
    ranking = diffhook.outliers(log)
    assert set(ranking.signals) == {"norm", "repeat", "loss", "input"}
    assert {BRIGHT, FLAT} <= set(ranking.sample_ids[:4].tolist())


def test_samples_whose_looks_no_visit_knows_have_no_distance(tmp_path: Path, figures: np.ndarray) -> None:
    figures[:, 5] = np.nan
    figures[0, 6] = np.nan  # another visit knows
    ranking = diffhook.outliers(
        made_log(tmp_path / "log", figures, np.arange(COUNT)), signals=["norm", "input"]
    )
    found = dict(zip(ranking.sample_ids.tolist(), ranking.signals["input"], strict=True))
    assert np.isnan(found[5])
    assert np.isfinite(found[6])


def test_a_log_without_looks_is_ranked_by_the_rest(tmp_path: Path, figures: np.ndarray) -> None:
    log = made_log(tmp_path / "log", np.full_like(figures, np.nan), np.arange(COUNT))
    assert set(diffhook.outliers(log).signals) == {"norm", "repeat", "loss"}
    with pytest.raises(ConfigurationError, match="nothing to rank by from input"):
        diffhook.outliers(log, signals=["input"])
