"""Two gloo processes: each rank its own group, together what one process logs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader, TensorDataset

import diffhook
from tests.integrations.two_processes import train
from tests.runs import identified

SCRIPT = Path(__file__).with_name("two_processes.py")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(SCRIPT), str(folder),
    ]  # fmt: skip
    environment = {"PYTHONPATH": str(SCRIPT.parents[2]), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def _found(out: Path, key: str) -> list[object]:
    return [json.loads((out / f"found-{rank}.json").read_text())[key] for rank in (0, 1)]


def test_the_ranks_together_log_what_one_process_does(out: Path, tmp_path: Path) -> None:
    """One process takes in one batch what two take in two."""
    train(tmp_path / "log", DataLoader(TensorDataset(identified()), 6), projection_dim="full")
    one, two = diffhook.open_log(tmp_path / "log").train, diffhook.open_log(out / "log").train
    assert sorted(p.name for p in (out / "log/train").glob("rank-*")) == ["rank-0000", "rank-0001"]
    columns = {}
    for name in ("step", "sample", "timestep", "weight", "lr", "loss", "grad_norm", "projection"):
        first, second = (t[name][np.lexsort((t["sample"], t["step"]))] for t in (one, two))
        columns[name] = first
        np.testing.assert_allclose(second, first, rtol=1e-4, atol=1e-6, err_msg=name)
    assert columns["sample"].tolist() == list(range(12))


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
