"""Two gloo processes train a model that FSDP spreads over them: together they log what one process does."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load

import diffhook
from tests.integrations.torchrun import assert_same_rows, assert_serve_alike, torchrun
from tests.integrations.two_sharded import KEPT, GatedDenoiser, loader, train

VERSIONS = (1, 2)
WAYS = ("log", "uneven", "failing", "ruled")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    torchrun("two_sharded.py", folder)
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> diffhook.RunLog:
    """One process takes in one batch what two take in two."""
    folder = tmp_path_factory.mktemp("one") / "log"
    train(folder, loader(6), Accelerator(cpu=True), every=1, **KEPT)
    return diffhook.open_log(folder)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_ranks_together_log_what_one_process_does(out: Path, one: diffhook.RunLog, version: int) -> None:
    log = diffhook.open_log(out / f"log-{version}")
    assert log.verify() == []
    assert len(log.train.groups) == 2
    assert_same_rows(one.train, log.train, rtol=1e-5)
    identities = [each.config["identity"] for each in (one, log)]
    assert identities[0]["parameters"] == identities[1]["parameters"], "names and shapes are the whole ones"
    assert identities[1]["model"]["class"].endswith(".GatedDenoiser")
    assert identities[1]["model"]["config"] == identities[0]["model"]["config"]


@pytest.mark.parametrize("version", VERSIONS)
def test_snapshots_are_whole_and_those_of_one_process(out: Path, one: diffhook.RunLog, version: int) -> None:
    log = diffhook.open_log(out / f"log-{version}")
    assert [(s.step, s.lr, s.lr_sum) for s in log.snapshots] == [
        (s.step, s.lr, s.lr_sum) for s in one.snapshots
    ]
    for ours, theirs in zip(log.snapshots, one.snapshots, strict=True):
        GatedDenoiser().load_state_dict(load(ours.parameters()))
        expected = load(theirs.parameters())
        for name, value in load(ours.parameters()).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("version", VERSIONS)
def test_queries_and_later_probes_work_on_the_log(
    out: Path, one: diffhook.RunLog, version: int, tmp_path: Path
) -> None:
    assert_serve_alike(Path(one.location), out / f"log-{version}", GatedDenoiser, tmp_path)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("way", WAYS)
def test_training_is_bit_identical(out: Path, way: str, version: int) -> None:
    """Also where the processes capture other steps, and where a pass of one alone fails in its midst."""
    for rank in (0, 1):
        same, collectives = json.loads((out / f"found-{rank}.json").read_text())[f"{way}-{version}"]
        assert same
        if version == 2:  # FSDP1 gathers the parameters of snapshots by the counted ones
            assert collectives, "we issue no collective in a step"


@pytest.mark.parametrize("version", VERSIONS)
def test_a_model_of_layers_with_rules_alone_loses_no_row(out: Path, version: int) -> None:
    log = diffhook.open_log(out / f"ruled-{version}")
    assert Counter(log.train["sample"].tolist()) == dict.fromkeys(range(12), 2)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_failure_of_one_process_costs_its_own_micro_batch(out: Path, version: int) -> None:
    groups = diffhook.open_log(out / f"failing-{version}").train.groups
    assert groups[0].committed == 12
    assert 0 < groups[1].committed < 12


def test_a_snapshot_that_one_process_alone_asks_for_is_left_out(out: Path) -> None:
    """Nobody waits in a collective, and those of all are there."""
    log = diffhook.open_log(out / "alone")
    assert [snapshot.step for snapshot in log.snapshots] == [3, 4]
    assert len(log.train) == 24
