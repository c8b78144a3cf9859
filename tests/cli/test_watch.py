"""``diffhook watch``: the table of samples, while a run writes and afterwards."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffhook.analysis.sample_table import ORDERS, sample_table
from diffhook.cli import main
from diffhook.errors import ConfigurationError
from diffhook.log import LogWriter, open_log
from diffhook.log.following import follow
from diffhook.log.samples import name_id

NAMES = [f"photos/{index}.png" for index in range(6)]
IDS = [name_id(name) for name in NAMES]
HARD, QUIET = 4, 1  # whose losses are 3 and ½ times as high as usual at every timestep
CONFIG = {"identity": {"projection": {"dim": 0, "seed": 0, "kind": "none"}, "parameters": [], "model": {}}}


def usual(timestep: Any) -> Any:
    """Losses differ a hundredfold between timesteps, so that raw means rank samples by chance."""
    return 10.0 ** (-2 * timestep / 1000)


def visit(writer: LogWriter, step: int) -> None:
    """One step at which every sample is at the same timestep."""
    timestep = np.full(len(NAMES), (step * 137) % 1000)
    factor = np.ones(len(NAMES))
    factor[[HARD, QUIET]] = 3.0, 0.5
    put(writer, IDS, step, timestep, usual(timestep) * factor)


def put(writer: LogWriter, ids: list[int], step: int, timestep: Any, loss: Any) -> None:
    floats = {"timestep": timestep, "lr": 0.1, "loss": loss, "weight": 1.0, "grad_norm": 2 * loss}
    integers = {"sample": ids, "step": step, "noise_seed": -1}
    columns = {name: np.broadcast_to(np.float32(value), len(ids)) for name, value in floats.items()}
    writer.put("train", columns | {n: np.broadcast_to(value, len(ids)) for n, value in integers.items()})


@pytest.fixture
def writer(tmp_path: Path) -> LogWriter:
    writer = LogWriter(tmp_path / "log", CONFIG)
    writer.keep_names(dict(zip(IDS, NAMES, strict=True)))
    for step in range(10):
        visit(writer, step)
    alert = {"kind": "loss-outlier", "level": "warning", "samples": [IDS[HARD]], "time": 0.0, "rank": 0}
    for step in (3, 7):
        writer.alert({**alert, "step": step, "message": "high"})
    writer.flush()
    return writer


def test_losses_are_set_against_the_typical_loss_of_their_timestep(writer: LogWriter, tmp_path: Path) -> None:
    table = sample_table(tmp_path / "log").sort("loss")
    by_name = {record["name"]: record for record in table.records()}
    assert table.records(1)[0]["name"] == NAMES[HARD]
    for index, factor in ((HARD, 3.0), (QUIET, 0.5), (0, 1.0)):
        record = by_name[NAMES[index]]
        assert [record[key] for key in ("last_loss", "mean_loss", "norm")] == pytest.approx([factor] * 3)
        assert (record["visits"], record["last_step"]) == (10, 9)
    assert (by_name[NAMES[HARD]]["alerts"], by_name[NAMES[HARD]]["last_alert"]) == (2, "loss-outlier, step 7")
    assert by_name[NAMES[0]]["last_alert"] == ""
    writer.close()


def test_every_order_is_descending_with_the_unknown_last(writer: LogWriter, tmp_path: Path) -> None:
    put(writer, [5], 10, 0.0, np.nan)
    writer.close()
    table = sample_table(tmp_path / "log")
    for by, attribute in ORDERS.items():
        values = getattr(table.sort(by), attribute).astype(float)
        known = values[~np.isnan(values)]
        assert (np.diff(known[np.isfinite(known)]) <= 0).all(), by
        assert len(known) == len(values) or np.isnan(values[-1]), by
    assert table.sort("norm").sample_ids[0] == 5, "a gradient that is not finite comes first"
    assert table.sort("loss").sample_ids[-1] == 5, "a loss that is not known says nothing"
    with pytest.raises(ConfigurationError, match="sort is 'size'; expected one of loss"):
        table.sort("size")


def test_once_prints_the_top_and_writes_every_sample(
    writer: LogWriter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log, out = str(tmp_path / "log"), tmp_path / "samples.csv"
    assert main(["watch", log, "--once", "--sort", "alerts", "--top", "2", "--csv", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "6 samples, 60 visits, up to step 9" in printed
    assert NAMES[HARD] in printed
    assert len([line for line in printed.splitlines() if ".png" in line]) == 2
    with open(out, newline="") as file:
        assert sorted(row["name"] for row in csv.DictReader(file)) == NAMES
    assert main(["watch", log, "--json", "--top", "1"]) == 0
    found = json.loads(capsys.readouterr().out)["samples"][0]
    assert (found["name"], found["mean_loss"]) == (NAMES[HARD], pytest.approx(3.0))
    writer.close()


def test_the_throttles_newest_factor_is_shown_where_it_is_below_1(
    writer: LogWriter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = {"kind": "throttle", "level": "warning", "message": "", "time": 0.0, "rank": 0}
    for step, sample, factor in ((4, HARD, 0.375), (5, QUIET, 0.5), (6, HARD, 0.25), (8, QUIET, 1.0)):
        writer.alert({**record, "step": step, "samples": [IDS[sample]], "value": factor})
    writer.close()
    log = str(tmp_path / "log")
    table = sample_table(log)
    found = dict(zip(table.sample_ids.tolist(), table.factor.tolist(), strict=True))
    assert found == {sample: 0.25 if sample == IDS[HARD] else 1.0 for sample in IDS}
    assert table.alerts.sum() == 2, "the throttle's records are none"
    assert main(["watch", log, "--once"]) == 0
    assert [NAMES[HARD] in line for line in capsys.readouterr().out.splitlines() if "0.25" in line] == [True]
    assert main(["info", log]) == 0
    assert any(
        line.split()[:2] == ["throttled", "samples"] and line.split()[-1] == "2"
        for line in capsys.readouterr().out.splitlines()
    )


def test_a_run_that_trains_is_seen_to_its_last_row(writer: LogWriter, tmp_path: Path) -> None:
    log = open_log(tmp_path / "log")
    looks = follow(log, interval=0)
    next(looks)
    assert sample_table(log).visits.sum() == 60
    visit(writer, 10)
    writer.flush()
    next(looks)
    assert sample_table(log).visits.sum() == 66
    visit(writer, 11)
    writer.close()
    next(looks)
    assert sample_table(log).visits.sum() == 72
    assert next(looks, "ended") == "ended"


def test_a_log_without_rows_yet_is_an_empty_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writer = LogWriter(tmp_path / "log", CONFIG)
    writer.flush()
    assert main(["watch", str(tmp_path / "log"), "--once"]) == 0
    assert "0 samples, 0 visits" in capsys.readouterr().out
    writer.close()
