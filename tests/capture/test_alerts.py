"""Alerts name the samples that misbehave, and only those."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import diffhook
from diffhook.capture import NonFinite, NormOutlier
from diffhook.log import Rows
from tests.runs import identified, train


def make_rows(norms: list[float], timesteps: list[float]) -> Rows:
    count = len(norms)
    return {
        "sample": np.arange(count),
        "step": np.full(count, 7),
        "timestep": np.asarray(timesteps, np.float32),
        "grad_norm": np.asarray(norms, np.float32),
    }


def test_non_finite_gradients_are_named() -> None:
    alerts = list(NonFinite().look(make_rows([1, np.nan, 2, np.inf], [1, 2, 3, 4])))
    assert [(a.samples, a.level) for a in alerts] == [([1, 3], "error")]
    assert "2 samples have a gradient that is not finite (1, 3)" in alerts[0].message
    assert alerts[0].to_json()["value"] == "nan"
    assert list(NonFinite().look(make_rows([1, 2], [1, 2]))) == []


def test_a_norm_is_judged_within_its_timestep_bin() -> None:
    rng = np.random.default_rng(0)
    detector = NormOutlier(threshold=6)
    timesteps = rng.integers(0, 1000, 3000)
    usual = np.where(timesteps < 500, 10.0, 0.1)  # a hundredfold between early and late
    norms = usual * np.exp(0.2 * rng.standard_normal(3000))
    assert list(detector.look(make_rows(norms.tolist(), timesteps.tolist()))) == []
    # Usual for an early timestep, and fifty times too long for a late one.
    found = list(detector.look(make_rows([10.0, 5.0], [100, 900])))
    assert [a.samples for a in found] == [[1]]
    assert found[0].value > 6
    assert re.search(r"sample 1 pulls (49|50)\.\d times", found[0].message)
    assert found[0].timestep == 900


def test_a_bin_keeps_quiet_until_it_has_seen_enough() -> None:
    detector = NormOutlier(warm_up=50)
    assert list(detector.look(make_rows([1.0] * 49 + [1e6], [5] * 50))) == []
    assert [a.samples for a in detector.look(make_rows([1e6], [5]))] == [[0]]


def test_a_nan_image_is_named_in_the_log_and_on_disk(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = identified()
    data[6, 0, 3, 3] = torch.nan
    with caplog.at_level(logging.WARNING, "diffhook"):
        train(tmp_path / "log", data=data, epochs=1, batch_size=12, projection_dim=16)
    alerts = diffhook.open_log(tmp_path / "log").alerts()
    assert [a["samples"] for a in alerts if a["kind"] == "non-finite"] == [[6]]
    assert any("sample 6 has a gradient that is not finite" in r.message for r in caplog.records)
    lines = (tmp_path / "log/alerts/rank-0000.jsonl").read_text().splitlines()
    assert len(lines) == len(alerts)
