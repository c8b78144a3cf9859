"""Two gloo processes: each rank its own group, together what one process logs."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
from torch.utils.data import DataLoader, TensorDataset

import diffhook
from tests.integrations.test_last_probe import assert_probes_are_of
from tests.integrations.torchrun import assert_same_rows, torchrun
from tests.integrations.two_processes import MANY, probe_options, train
from tests.integrations.two_sittings import SAVED
from tests.runs import TinyDenoiser, identified

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    torchrun("two_processes.py", folder)
    return folder


@pytest.fixture(scope="module")
def sittings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sittings")
    torchrun("two_sittings.py", folder, killed=True)
    return folder


def _found(out: Path, key: str) -> list[object]:
    return [json.loads((out / f"found-{rank}.json").read_text())[key] for rank in (0, 1)]


def test_the_ranks_together_log_what_one_process_does(out: Path, tmp_path: Path) -> None:
    """One process takes in one batch what two take in two."""
    train(tmp_path / "log", DataLoader(TensorDataset(identified()), 6), projection_dim="full")
    one, two = diffhook.open_log(tmp_path / "log").train, diffhook.open_log(out / "log").train
    assert sorted(p.name for p in (out / "log/train").glob("rank-*")) == ["rank-0000", "rank-0001"]
    assert_same_rows(one, two, rtol=1e-4)
    assert sorted(two["sample"]) == list(range(12))


def test_the_ranks_share_the_probes_and_together_make_one_process_s(out: Path, tmp_path: Path) -> None:
    train(tmp_path / "log", DataLoader(TensorDataset(identified()), 6), projection_dim=16, **probe_options())
    one, two = diffhook.open_log(tmp_path / "log").probe, diffhook.open_log(out / "probed").probe
    assert len(two.groups) == 2
    assert min(group.committed for group in two.groups) > 0, "one rank has probed nothing"
    ours, theirs = (
        {name: t[name][np.lexsort([t["noise_seed"], t["sample"], t["step"]])] for name in t.columns}
        for t in (two, one)
    )
    for name in ("step", "sample", "noise_seed", "lr", "weight"):
        np.testing.assert_array_equal(ours[name], theirs[name], name)
    np.testing.assert_allclose(ours["grad_norm"], theirs["grad_norm"], rtol=1e-4)


def test_the_ranks_share_the_probe_at_the_end_and_leave_out_no_sample(out: Path) -> None:
    """Each knows the inputs of its own samples."""
    log = diffhook.open_log(out / "at-end")
    ranks = [np.unique(group.column("sample")) for group in log.probe.groups]
    assert sorted(np.concatenate(ranks).tolist()) == list(range(144))
    assert min(map(len, ranks)) > 0, "one rank has probed nothing"
    assert len(log.probe) == 144 * diffhook.Grid(**log.grid or {}).rows
    assert len(np.unique(log.probe["weight"])) == 1


def test_every_rank_probes_the_weights_of_the_snapshot_at_the_end(out: Path) -> None:
    """The first process has loaded others since, and has them again afterwards."""
    assert _found(out, "halved again") == [True, True]
    log = diffhook.open_log(out / "halved")
    assert [snapshot.step for snapshot in log.snapshots] == [12]
    assert min(group.committed for group in log.probe.groups) > 0
    assert len(np.unique(log.probe["sample"])) == len(MANY)
    model = TinyDenoiser()
    model.load_state_dict(safetensors.torch.load(log.snapshots[0].parameters()))
    assert_probes_are_of(model, log, MANY)


def test_training_is_bit_identical_with_and_without_us_on_every_rank(out: Path) -> None:
    assert _found(out, "same") == [True, True]


def test_we_issue_no_collective(out: Path) -> None:
    for plain, watched in _found(out, "collectives"):  # type: ignore[misc]
        assert watched == plain


def test_alerts_fire_on_every_rank_and_repeats_are_rows_of_their_own(out: Path) -> None:
    log = diffhook.open_log(out / "damaged")
    assert (out / "damaged/alerts/rank-0001.jsonl").exists(), "the damaged sample is rank 1's"
    assert 3 in {sample for alert in log.alerts() for sample in alert["samples"]}
    visits = Counter(log.train["sample"].tolist())
    assert set(visits) == set(range(11))
    assert sum(visits.values()) == 12, "even_batches has repeated one sample"


def test_dispatched_batches_keep_their_ids(out: Path) -> None:
    assert sorted(diffhook.open_log(out / "dispatched").train["sample"]) == list(range(70, 82))
    for rank in (0, 1):
        assert len(list((out / f"dispatched/train/rank-{rank:04d}").iterdir())) > 1


def _visits(log: Path) -> list[tuple[int, int, int, int]]:
    """(rank, step, sample, timestep) of every row that counts."""
    table = diffhook.open_log(log).train
    assert diffhook.open_log(log).verify() == []
    ranks = [rank for rank, group in enumerate(table.groups) for _ in group.column("step")]
    columns = (table[name].astype(int).tolist() for name in ("step", "sample", "timestep"))
    return sorted(zip(ranks, *columns, strict=True))


def test_a_checkpoint_of_the_main_process_keeps_the_rows_of_every_rank(sittings: Path) -> None:
    """It alone saves, then all are killed."""
    whole = _visits(sittings / "whole")
    assert _visits(sittings / "log") == [visit for visit in whole if visit[1] < SAVED[1]]


@pytest.mark.parametrize("saved", SAVED)
def test_ranks_that_resume_lose_and_double_nothing(sittings: Path, tmp_path: Path, saved: int) -> None:
    """From a checkpoint of every process, and from a later one of the main process."""
    shutil.copytree(sittings, tmp_path / "copy")
    torchrun("two_sittings.py", tmp_path / "copy", saved)
    assert _visits(tmp_path / "copy/log") == _visits(sittings / "whole")


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (4, 3)])
def test_a_run_comes_back_with_another_number_of_processes(before: int, after: int, tmp_path: Path) -> None:
    """Any one of them is killed beyond the last checkpoint, and the others are ended whatever they do."""
    killed = random.Random(before).randrange(before)
    torchrun("world_sizes.py", tmp_path, 11, killed, processes=before, killed=True)
    torchrun("world_sizes.py", tmp_path, 14, -1, 8, processes=after)
    log = diffhook.open_log(tmp_path / "log")
    assert log.verify() == []
    rows = sorted(zip(log.train["step"].tolist(), log.train["sample"].tolist(), strict=True))
    first, second = ((before, 0, range(8)), (after, 8000, range(8, 14)))
    assert rows == [
        (step, base + number)
        for processes, base, steps in (first, second)
        for step in steps
        for number in range(2 * step * processes, 2 * (step + 1) * processes)
    ], "no row is lost, none is there twice"
    assert [session.parent for session in log.sessions] == [None, 0], "the ranks have agreed on each session"
    assert log.live_ranks == set(range(after))


def test_each_rank_throttles_its_own_rows_and_the_training_is_that_of_weighted_losses(out: Path) -> None:
    assert max(float(str(apart)) for apart in _found(out, "apart")) < 1e-6
    table = diffhook.open_log(out / "throttled").train
    weights = dict(zip(table["sample"].tolist(), (6 * table["weight"]).tolist(), strict=True))
    assert weights == {sample: 0.25 if sample in (2, 7, 8) else 1.0 for sample in range(12)}
