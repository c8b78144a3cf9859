"""Snapshots of a training: the parameters of their step, and what the plan says of their size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch
from torch import Tensor

import diffhook
from diffhook.capture.loop.run.volume import Volume
from tests.runs import SteppedTraining


class _Disk(NamedTuple):
    free: int


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("copied", [0, 1 << 20], ids=["written at once", "copied"])
def test_a_snapshot_holds_the_parameters_of_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copied: int, dtype: Any
) -> None:
    monkeypatch.setattr("diffhook.log.writer._COPIED", copied)
    training = SteppedTraining(
        tmp_path / "log", snapshot_every=1, snapshot_dtype=dtype, keep_preconditioner=True, strict=True
    )
    expected: list[dict[str, Tensor]] = []
    for number in range(3):
        training.step(number)
        expected.append({name: p.detach().clone() for name, p in training.model.named_parameters()})
    training.accelerator.end_training()
    snapshots = diffhook.open_log(tmp_path / "log").snapshots
    assert [snapshot.step for snapshot in snapshots] == [1, 2, 3]
    for snapshot, parameters in zip(snapshots, expected, strict=True):
        kept = safetensors.torch.load(snapshot.parameters())
        assert kept.keys() == parameters.keys()
        for name, parameter in parameters.items():
            assert torch.equal(kept[name], parameter.to(getattr(torch, dtype or "float32")))
        divisors = safetensors.torch.load(snapshot.preconditioner() or b"")
        assert {divisor.dtype for divisor in divisors.values()} == {torch.float32}


def test_weights_that_the_loop_changes_after_each_step_are_the_steps_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    training = SteppedTraining(tmp_path / "log", strict=True)
    for number in range(3):
        training.step(number)
        with torch.no_grad():
            for parameter in training.model.parameters():
                parameter.clamp_(-0.01, 0.01)
    training.accelerator.end_training()
    (snapshot,) = diffhook.open_log(tmp_path / "log").snapshots
    assert dict(snapshot.details) == {}
    assert "weights" not in caplog.text


def test_a_disk_that_is_too_small_for_the_snapshots_is_told_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("diffhook.log.store.shutil.disk_usage", lambda path: _Disk(3000))
    training = SteppedTraining(tmp_path / "log", snapshot_every=10)
    training.step(0)
    training.accelerator.end_training()
    (told,) = [r.getMessage() for r in caplog.records if "free" in r.getMessage()]
    assert told.startswith("3 snapshots need 3.4 kB, and the log's disk has 3.0 kB free: what does not fit")


def test_the_plan_adds_up_a_run() -> None:
    """A gigabyte every 100 steps, and a megabyte of rows each step: 110 MB in 10 steps."""
    volume = Volume(rows=1e6, snapshot=10**9, snapshot_every=100, epoch=1000, free=10**11)
    assert volume.step == pytest.approx(11e6)
    assert volume.snapshots_text().endswith("every 100 steps, 10.0 GB an epoch")
    assert volume.room_text() == "the disk has 100.0 GB free, enough for 9,091 steps"
    assert volume.shortage() is None
    short = replace(volume, free=10**10).shortage()
    assert short is not None
    assert short.startswith("an epoch of rows and snapshots needs 11.0 GB")
