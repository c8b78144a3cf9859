"""Sums of rows score as the rows did, and serve nothing else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import diffhook
from diffhook.analysis.aggregation import Aggregation
from diffhook.analysis.tables import nearest
from diffhook.analysis.timesteps import influence_by_timestep
from diffhook.cli import main
from diffhook.errors import ConfigurationError, LogError
from diffhook.log import LogWriter, Snapshot, open_log
from diffhook.log.compaction import compact
from tests.analysis.synthetic import DIM, SAMPLES, STEPS, config, make_rows, stored, synthetic, write_queries

METHODS = ("tracin", "retrac")
BROKEN = 99  # a sample of which no gradient was finite


@pytest.fixture
def log(tmp_path: Path) -> diffhook.RunLog:
    synthetic(tmp_path / "log")
    rows = stored(make_rows(np.random.default_rng(1), [(BROKEN, 10, 7.0, -1)] * 3, 0.25))
    writer = LogWriter(tmp_path / "log", config(), start_step=10)
    writer.put("train", {**rows, "grad_norm": np.float32([np.inf, np.nan, 0])})
    writer.close()
    return open_log(tmp_path / "log")


def summed(log: diffhook.RunLog, method: str, **options: int) -> diffhook.RunLog:
    target = Path(log.location).with_name(f"sums-{method}")
    compact(log.location, target, aggregation=Aggregation(method, **options))
    return open_log(target)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("memory", [2 << 30, 4096], ids=["whole", "in parts"])
def test_a_row_is_the_sum_of_its_samples_rows_near_the_snapshot(
    log: diffhook.RunLog, method: str, memory: int
) -> None:
    found = summed(log, method, memory=memory).train
    rows = {name: log.train[name].astype(np.float64) for name in log.train.columns}
    near = nearest(log.train["step"], np.array(STEPS))
    assert found["projection"].dtype == np.float32
    assert len(found) == len(SAMPLES) * len(STEPS) + 1
    for row in range(len(found)):
        total, rate = np.zeros(DIM), 0.0
        for r in range(len(log.train)):
            same = rows["sample"][r] == found["sample"][row] and STEPS[near[r]] == found["step"][row]
            if same and 0 < rows["grad_norm"][r] < np.inf:
                own = rows["lr"][r] * rows["weight"][r]
                length = rows["grad_norm"][r] if method == "tracin" else 1.0
                total += own * length * rows["projection"][r]
                rate += own
        factor = found["lr"][row] * found["weight"][row]
        factor *= found["grad_norm"][row] if method == "tracin" else 1.0
        np.testing.assert_allclose(factor * found["projection"][row], total, rtol=1e-5, atol=1e-8)
        np.testing.assert_allclose(found["lr"][row] * found["weight"][row], rate, rtol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("source", ["train", "probe"])
def test_scores_of_the_sums_are_those_of_the_rows(log: diffhook.RunLog, method: str, source: str) -> None:
    sums = summed(log, method)
    before = diffhook.influence(log, "new", method, source)
    after = diffhook.influence(sums, "new", method, source)
    assert np.abs(before.values).max() > 0
    np.testing.assert_array_equal(after.sample_ids, before.sample_ids)
    np.testing.assert_allclose(after.values, before.values, rtol=1e-5, atol=1e-6)
    draws = before._pass.draws
    assert draws is not None
    of_queries = replace(before._pass, draws=replace(draws, by_row=False, paired=False)).uncertainty()
    assert of_queries is not None
    np.testing.assert_allclose(after.errors, of_queries.error, rtol=1e-4, atol=1e-6)
    own, own_before = (diffhook.self_influence(found, method, source) for found in (sums, log))
    np.testing.assert_array_equal(own.sample_ids, own_before.sample_ids)
    np.testing.assert_allclose(own.scores, own_before.scores, rtol=1e-5, atol=1e-12)
    assert BROKEN in diffhook.influence(sums, "new", method, "train").sample_ids
    assert sums.verify() == []


def test_a_query_set_of_training_samples_stays_what_it_was(log: diffhook.RunLog) -> None:
    sums = summed(log, "retrac")
    before, after = (diffhook.influence(found, "squared", "d-trak", "train-squared") for found in (log, sums))
    np.testing.assert_array_equal(after.values, before.values)


@pytest.mark.parametrize("source", ["train", "probe"])
def test_whatever_looks_at_single_rows_is_refused_in_words(log: diffhook.RunLog, source: str) -> None:
    sums = summed(log, "retrac")
    refused = "holds sums of rows for retrac .*needs the rows themselves: ask the log that it was made from"
    for method in ("tracin", "cosine", "trak"):
        with pytest.raises(ConfigurationError, match=f"method '{method}' needs"):
            diffhook.influence(sums, "new", method, source)
    with pytest.raises(ConfigurationError, match="method 'tracin' needs"):
        diffhook.self_influence(sums, "tracin", source)
    with pytest.raises(ConfigurationError, match=refused):
        diffhook.bias(sums, source)
    with pytest.raises(ConfigurationError, match=refused):
        diffhook.outliers(sums, source)
    with pytest.raises(ConfigurationError, match=refused):
        influence_by_timestep(sums, "new", np.zeros((4, 1), int), "retrac", source)


def test_a_run_does_not_go_on_in_sums_nor_are_they_summed_again(log: diffhook.RunLog) -> None:
    sums = summed(log, "tracin")
    with pytest.raises(LogError, match=r"aggregate: the log has 'tracin', this run None"):
        LogWriter(sums.location, config(), start_step=10)
    with pytest.raises(ConfigurationError, match="holds sums of rows already, for tracin"):
        compact(sums.location, Path(log.location).with_name("again"), aggregation=Aggregation("tracin"))


def test_sums_are_at_every_snapshot_so_queries_must_be(log: diffhook.RunLog, tmp_path: Path) -> None:
    writer = LogWriter(log.location, config(), start_step=11)
    writer.snapshot(Snapshot(12, 0.1, 0.4, writer.session), b"")
    writer.close()
    with pytest.raises(ConfigurationError, match=r"queries '.*' are at 2 of the log's 3 snapshots"):
        summed(open_log(log.location), "tracin")
    assert not (tmp_path / "sums-tracin").exists()


def test_sums_can_be_folded_too(log: diffhook.RunLog, tmp_path: Path) -> None:
    projection = {"dim": DIM, "seed": 0, "kind": "sketch"}
    sketched = {"identity": {**config()["identity"], "projection": projection}}
    rng = np.random.default_rng(2)
    cells = [(int(s), step, 5.0, -1) for step in range(9) for s in SAMPLES]
    rows = stored(make_rows(rng, cells, 0.25))
    writer = LogWriter(tmp_path / "sketch", sketched)
    writer.put("train", {**rows, "projection": rows["projection"].astype(np.float16)})
    for step in STEPS:
        writer.snapshot(Snapshot(step, 0.1, 0.4, writer.session), b"")
    writer.close()
    write_queries(tmp_path / "sketch", "new", make_rows(rng, [(1, s, 5.0, 0) for s in STEPS], 1.0))
    compact(tmp_path / "sketch", tmp_path / "folded", dim=8)
    compact(tmp_path / "sketch", tmp_path / "sums", dim=8, aggregation=Aggregation("tracin"))
    folded, sums = open_log(tmp_path / "folded"), open_log(tmp_path / "sums")
    assert (sums.train.dim, sums.queries["new"].dim) == (8, 8)
    compact(tmp_path / "sums", tmp_path / "copy")
    np.testing.assert_array_equal(open_log(tmp_path / "copy").train["projection"], sums.train["projection"])
    before, after = (diffhook.influence(found, "new", "tracin").values for found in (folded, sums))
    np.testing.assert_allclose(after, before, rtol=5e-3, atol=np.abs(before).max() * 2e-3)  # float16 before


def test_it_is_a_command_and_info_tells(log: diffhook.RunLog, capsys: pytest.CaptureFixture[str]) -> None:
    target = str(Path(log.location).with_name("small"))
    assert main(["compact", log.location, "--out", target, "--aggregate", "retrac", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["rows summed for"], facts["train rows"], facts["probe rows"]) == ("retrac", 15, 14)
    with pytest.raises(ConfigurationError, match="expected tracin or retrac"):
        Aggregation("trak")
