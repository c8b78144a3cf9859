"""The map's positions are the first two principal components of the samples' mean unit gradients."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diffhook.analysis.execution import Execution
from diffhook.analysis.sample_map import sample_map
from diffhook.log import LogWriter, RunLog, open_log
from tests.analysis.synthetic import sketched

DIM, SAMPLES, VISITS = 32, 300, 4
CONFIG = sketched(DIM)


def _log(path: Path, broken: int | None = None) -> tuple[RunLog, np.ndarray]:
    """Rows of samples whose directions have two axes in common, and the (N, D) unit means in float64."""
    rng = np.random.default_rng(0)
    sample = np.repeat(np.arange(SAMPLES), VISITS)
    own = rng.standard_normal((SAMPLES, 2)) * (5, 3) @ np.linalg.qr(rng.standard_normal((DIM, 2)))[0].T + 1
    projection = own[sample] + 0.5 * rng.standard_normal((len(sample), DIM))
    projection = (projection / np.linalg.norm(projection, axis=1, keepdims=True)).astype(np.float16)
    norm = np.ones(len(sample), np.float32)
    norm[sample == broken] = np.nan
    ones = np.ones(len(sample), np.float32)
    writer = LogWriter(path, CONFIG)
    writer.put(
        "train",
        {
            "sample": sample, "step": np.arange(len(sample)), "timestep": 0 * ones,
            "noise_seed": np.full(len(sample), -1), "lr": ones, "loss": ones, "weight": ones,
            "grad_norm": norm, "projection": projection,
        },
    )  # fmt: skip
    writer.close()
    means = np.add.reduceat(projection.astype(np.float64), np.arange(0, len(sample), VISITS))
    return open_log(path), means / np.linalg.norm(means, axis=1, keepdims=True)


def _twin(units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whole singular value decomposition."""
    u, s, _ = np.linalg.svd(units - units.mean(0), full_matrices=False)
    return u[:, :2] * s[:2], s[:2] ** 2 / (s**2).sum()


@pytest.mark.parametrize("memory", [2 << 30, 1 << 14])
def test_positions_are_the_principal_components(tmp_path: Path, memory: int) -> None:
    log, units = _log(tmp_path / "log")
    found = sample_map(log.train, Execution(scheduler="synchronous", memory=memory))
    expected, shares = _twin(units)
    expected *= np.sign((expected * found.positions).sum(0))
    assert found.sample_ids.tolist() == list(range(SAMPLES))
    np.testing.assert_allclose(found.positions, expected, atol=1e-5)
    np.testing.assert_allclose(found.shares, shares, rtol=1e-4)


def test_a_sample_without_a_usable_gradient_has_no_place_and_moves_no_other(tmp_path: Path) -> None:
    log, units = _log(tmp_path / "log", broken=7)
    found = sample_map(log.train, Execution(scheduler="synchronous"))
    assert np.isnan(found.positions[7]).all()
    expected, _ = _twin(np.delete(units, 7, axis=0))
    others = np.delete(found.positions, 7, axis=0)
    np.testing.assert_allclose(others, expected * np.sign((expected * others).sum(0)), atol=1e-5)


def test_of_some_samples_the_map_is_their_own(tmp_path: Path) -> None:
    log, units = _log(tmp_path / "log")
    chosen = np.arange(5, SAMPLES, 3)
    found = sample_map(log.train, Execution(scheduler="synchronous"), chosen)
    assert found.sample_ids.tolist() == chosen.tolist()
    expected, _ = _twin(units[chosen])
    expected *= np.sign((expected * found.positions).sum(0))
    np.testing.assert_allclose(found.positions, expected, atol=1e-5)
    assert not len(sample_map(log.train, Execution(), np.array([-1])).positions)


def test_the_same_log_has_the_same_map(tmp_path: Path) -> None:
    log, _ = _log(tmp_path / "log")
    first, second = (sample_map(log.train, Execution()).positions for _ in range(2))
    np.testing.assert_array_equal(first, second)
