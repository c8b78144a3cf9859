"""Queries are set against rows whose noise fits theirs, and nothing else is scored without a word."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import diffhook
from diffhook.errors import ConfigurationError
from diffhook.log.table_writer import TableWriter
from tests.analysis.synthetic import DIM, STEPS, Synthetic, stored, synthetic
from tests.runs import SCHEDULER, TinyDenoiser, train

OBJECTIVE = diffhook.DiffusionObjective(SCHEDULER)
PROBED = diffhook.Grid([5, 300, 900], draws=2, seed=4)
IMAGES = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> diffhook.RunLog:
    path = tmp_path_factory.mktemp("pairing") / "log"
    probe = diffhook.Probe(samples=None, grid=PROBED)
    train(path, projection_dim=64, snapshot_every=4, objective=OBJECTIVE, probe=probe)
    return diffhook.open_log(path)


def ask(log: diffhook.RunLog, name: str, **options: Any) -> Any:
    return diffhook.query(log, (IMAGES,), name, OBJECTIVE, model=TinyDenoiser(), **options)


def noise(table: Any, own_noise: int = 0) -> set[tuple[float, int, int]]:
    """(timestep, replicate, seed) of a table's rows."""
    mine = table["own_noise"] == own_noise
    keys = ("timestep", "replicate", "noise_seed")
    return set(zip(*(table[c][mine].tolist() for c in keys), strict=True))


def test_queries_share_the_probes_noise_draw_by_draw_unless_told_otherwise(probed: diffhook.RunLog) -> None:
    table = ask(probed, "default")
    assert noise(table) == noise(probed.probe)
    assert table.description["grid"] == PROBED.describe()
    own = noise(table, own_noise=1)
    assert len({seed for _, _, seed in own}) == 3 * 3, "no two queries or timesteps have the same"


def test_a_set_serves_every_source_that_the_log_holds(
    probed: diffhook.RunLog, caplog: pytest.LogCaptureFixture
) -> None:
    ask(probed, "both")
    for source in ("train", "probe"):
        assert diffhook.influence(probed, "both", "retrac", source).values.any()
    assert not caplog.records


@pytest.mark.parametrize(("against", "source"), [("train", "probe"), ("probe", "train")])
def test_rows_of_the_wrong_noise_are_refused_with_what_to_do(
    probed: diffhook.RunLog, against: str, source: str
) -> None:
    name = f"for-{against}"
    ask(probed, name, against=against)
    diffhook.influence(probed, name, "retrac", against)
    with pytest.raises(
        ConfigurationError, match=rf"query\(\.\.\., '{name}', against='{source}', overwrite=True"
    ):
        diffhook.influence(probed, name, "retrac", source)


def test_a_query_set_as_the_source_is_taken_by_the_grids_noise(probed: diffhook.RunLog) -> None:
    ask(probed, "asked")
    expected = ask(probed, "one-kind", against="probe")
    ask(probed, "two-kinds", against=("train", "probe"))
    one = diffhook.influence(probed, "asked", "trak", "one-kind").values
    two = diffhook.influence(probed, "asked", "trak", "two-kinds").values
    np.testing.assert_allclose(one, two, rtol=1e-5)
    assert len(expected) * 2 == len(probed.queries["two-kinds"])
    ask(probed, "own-kind", against="train")
    with pytest.raises(ConfigurationError, match="queries 'own-kind' have noise of their own"):
        diffhook.influence(probed, "asked", "trak", "own-kind")


def test_another_grid_than_the_probes_is_told(
    probed: diffhook.RunLog, caplog: pytest.LogCaptureFixture
) -> None:
    ask(probed, "coarse", grid=diffhook.Grid([5, 900], draws=4, seed=4))
    with caplog.at_level(logging.WARNING, "diffhook"):
        diffhook.influence(probed, "coarse", "retrac", "train")
        assert not caplog.records, "the training's rows are on no grid"
        diffhook.influence(probed, "coarse", "retrac", "probe")
    assert "on the grid 2 timesteps × 4 draws × 1 replicates (seed 4)" in caplog.text
    assert "source 'probe' is on 3 timesteps × 2 draws" in caplog.text


def test_queries_whose_noise_the_log_does_not_tell_are_told_and_not_scored(tmp_path: Path) -> None:
    made: Synthetic = synthetic(tmp_path / "log")
    writer = TableWriter(made.log.writable_store(), "queries/old/rank-0000", DIM, "float32")
    writer.append(stored(made.queries["new"]))
    writer.flush()
    writer.describe({"objective": {"measurement": "loss"}, "snapshots": [[step, 0] for step in STEPS]})
    for source in ("train", "probe"):
        with pytest.raises(ConfigurationError, match="'old' have noise of which the log says nothing"):
            diffhook.influence(made.log, "old", "retrac", source)


def test_probes_of_a_resumed_run_have_the_noise_that_they_would_have_had(tmp_path: Path) -> None:
    options: dict[str, Any] = {"projection_dim": 8, "objective": OBJECTIVE, "snapshot_every": 2}
    options["probe"] = diffhook.Probe(2, PROBED)
    train(tmp_path / "log", epochs=2, **options)
    table = diffhook.open_log(tmp_path / "log").probe
    at = [noise_at(table, step) for step in np.unique(table["step"])]
    assert len(at) > 2
    assert all(each == at[0] for each in at), "a pure function: every snapshot, process and session agrees"


def noise_at(table: Any, step: int) -> set[tuple[float, int]]:
    mine = table["step"] == step
    return set(zip(table["timestep"][mine].tolist(), table["noise_seed"][mine].tolist(), strict=True))


def test_what_a_set_is_for_must_be_known(probed: diffhook.RunLog) -> None:
    for wrong in ("events", (), ("train", "grid")):
        with pytest.raises(ConfigurationError, match="expected 'train', 'probe', or both"):
            ask(probed, "wrong", against=wrong)
