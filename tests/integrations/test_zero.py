"""Two gloo processes train with DeepSpeed's ZeRO-1 and ZeRO-2: together they log what one process does.

DeepSpeed is none of the packages that the tests ask for; where it is installed, it compiles a part of itself.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load

import diffhook
from tests.integrations.torchrun import assert_same_rows, assert_serve_alike, torchrun
from tests.integrations.two_sharded import KEPT, GatedDenoiser, loader, train
from tests.runs import probed

pytest.importorskip("deepspeed")

LOGS = ("log-1", "log-2", "accelerated")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zero")
    torchrun("two_zero.py", folder)
    train(folder / "one", loader(6), Accelerator(cpu=True), every=1, **KEPT)
    return folder


@pytest.mark.parametrize("name", LOGS)
def test_the_ranks_together_log_what_one_process_does(out: Path, name: str) -> None:
    one, two = (diffhook.open_log(out / each) for each in ("one", name))
    assert two.verify() == []
    assert_same_rows(one.train, two.train, rtol=1e-5)
    assert [(s.step, s.lr, s.lr_sum) for s in two.snapshots] == [
        (s.step, s.lr, s.lr_sum) for s in one.snapshots
    ]
    for ours, theirs in zip(two.snapshots, one.snapshots, strict=True):
        torch.testing.assert_close(load(ours.parameters()), load(theirs.parameters()), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", LOGS)
def test_queries_and_later_probes_work_on_the_log(out: Path, name: str, tmp_path: Path) -> None:
    assert_serve_alike(out / "one", out / name, GatedDenoiser, tmp_path)


@pytest.mark.parametrize("stage", [1, 2])
def test_accumulated_micro_batches_have_the_norms_of_their_samples_and_half_the_weight(
    out: Path, stage: int
) -> None:
    one, two = (diffhook.open_log(out / f"{name}-{stage}").train for name in ("log", "accumulated"))
    assert np.bincount(two["step"].astype(int)).tolist() == [12] * 4
    np.testing.assert_allclose(two["weight"], one["weight"][0] / 2, rtol=1e-6)
    for sample in range(6):
        norms = [t["grad_norm"][(t["sample"] == sample) & (t["step"] == 0)] for t in (one, two)]
        np.testing.assert_allclose(norms[1], norms[0][0], rtol=1e-5)


def test_training_is_bit_identical_and_rows_are_exact(out: Path) -> None:
    for rank in (0, 1):
        found = json.loads((out / f"found-{rank}.json").read_text())
        for stage in ("1", "2"):
            same, same_accumulated, error = found[stage]
            assert same
            assert same_accumulated
            assert error < 1e-5
        assert found["bf16"]
        assert found["accelerated"]
        assert found["probed"]


def test_probes_are_those_of_one_process(out: Path, tmp_path: Path) -> None:
    train(tmp_path, loader(6), Accelerator(cpu=True), every=1, **KEPT, **probed())
    one, two = (diffhook.open_log(path).probe for path in (tmp_path, out / "probed"))
    assert one is not None
    assert two is not None
    assert len(two) > 0
    assert_same_rows(one, two, rtol=1e-4)
