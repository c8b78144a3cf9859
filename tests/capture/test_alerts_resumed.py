"""Detectors of a run in two sittings know what those of one sitting would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import diffhook
from diffhook import Alerts
from diffhook.appearance import COLUMNS
from diffhook.capture.alerts import Watch
from diffhook.capture.alerts.replay import replayed_steps
from diffhook.log import LogWriter, Rows
from diffhook.log.rank import RankGroup
from tests.analysis.synthetic import config
from tests.capture.test_alerts import clean_run, make_rows


def _watched(path: Path, run: list[Rows], start: int, stop: int) -> list[dict[str, Any]]:
    """The alerts of the log once these steps were added to it."""
    writer = LogWriter(path, config(), start_step=start)
    watch = Watch(Alerts(rate=0.01, sinks=[], most=1000), writer.alert, list, rank=0)
    if start:
        watch.resume(writer.past())
    for rows in run[start:stop]:
        writer.put(
            "train",
            {
                **rows,
                **{n: np.full(32, 1.0) for n in ("weight", "noise_seed")},
                "projection": np.zeros((32, 24)),
            },
        )
        watch.look(rows)
    watch.close()
    writer.close()
    return [{**a, "time": 0, "session": 0} for a in diffhook.open_log(path).alerts()]


def test_a_run_stopped_in_the_middle_raises_the_alerts_of_one_that_was_not(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    run = clean_run(300, rng, count=300)
    for rows in run:
        rows["grad_norm"][rows["sample"] == 17] *= 3.0  # type: ignore[index]
        for column in COLUMNS:
            rows[column] = np.exp(rng.normal(0, 0.1, 32)).astype(np.float32)  # type: ignore[index]
            rows[column][rows["sample"] == 23] *= 4.0  # type: ignore[index]
    whole = _watched(tmp_path / "whole", run, 0, 300)
    _watched(tmp_path / "parts", run, 0, 220)
    parts = _watched(tmp_path / "parts", run, 150, 300)
    for kind in ("norm-outlier", "input-outlier"):
        assert {a["step"] >= 150 for a in whole if a["kind"] == kind} == {False, True}
    assert parts == whole, "what the first sitting learned is not known to the second"


def test_a_resumed_run_reads_only_the_rows_that_it_looks_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffhook.log.table_writer.rows_per_shard", lambda dim, dtype: 16)
    for start in (0, 30):  # the second sitting takes ten steps again
        writer = LogWriter(tmp_path, config(), start_step=start)
        for step in range(start, start + 40):
            rows = make_rows(np.ones(5), np.full(5, 3.0), np.arange(5) + 5 * step, step)
            ones = {name: np.ones(5) for name in ("weight", "noise_seed")}
            writer.put("train", {**rows, **ones, "projection": np.zeros((5, 24))})
        writer.close()
    read: list[tuple[str, int]] = []
    original = RankGroup.read

    def reading(group: RankGroup, column: str, start: int, stop: int, *rest: Any) -> Any:
        read.append((column, stop - start))
        return original(group, column, start, stop, *rest)

    monkeypatch.setattr(RankGroup, "read", reading)
    steps = list(replayed_steps(diffhook.open_log(tmp_path), 0, most=23))
    assert sum(rows for column, rows in read if column == "sample") <= 23 + 2 * 16
    found = np.concatenate([step["sample"] for step in steps])
    np.testing.assert_array_equal(found, diffhook.open_log(tmp_path).train["sample"][-23:])
    assert [len(step["sample"]) for step in steps] == [3, 5, 5, 5, 5]
