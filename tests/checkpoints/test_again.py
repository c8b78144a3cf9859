"""A measurement that is asked for again: what it may go on with, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import diffhook
from diffhook.cli import main
from diffhook.cli.info import describe
from diffhook.errors import ConfigurationError, LogError
from diffhook.log import RunLog
from diffhook.log.reference import MovedCheckpointError
from tests.runs import SCHEDULER, TinyDenoiser, identified, train

OBJECTIVE = diffhook.DiffusionObjective(SCHEDULER)
GRID = diffhook.Grid(2)
IMAGES = identified(20)
NAMES = {i: f"{i:02d}.png" for i in range(len(IMAGES))}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    for step in (10, 20):
        save(tmp_path / f"checkpoint-{step}", step)
    return tmp_path


def save(folder: Path, step: int, lr: float | None = 0.1) -> None:
    torch.manual_seed(step)
    folder.mkdir()
    torch.save(TinyDenoiser().state_dict(), folder / "model.bin")
    if lr is not None:
        torch.save({"param_groups": [{"lr": lr, "params": []}], "state": {}}, folder / "optimizer.bin")


def measure(out: Path, samples: Any = None, pattern: str = "checkpoint-*", **options: Any) -> RunLog:
    probe = diffhook.Probe(samples, options.pop("grid", GRID))
    data = [(image,) for image in options.pop("images", IMAGES)]
    return diffhook.from_checkpoints(
        TinyDenoiser(), str(out / pattern), data, OBJECTIVE, out / "log", probe=probe, projection_dim=16,
        names=options.pop("names", NAMES), **options,
    )  # fmt: skip


def test_only_what_is_missing_is_measured(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(measure(out, 5).probe) == 5 * 2 * GRID.rows
    assert len(measure(out, 8).probe) > 5 * 2 * GRID.rows
    assert len(measure(out).probe) == 20 * 2 * GRID.rows
    capsys.readouterr()
    measure(out)
    assert "rows to measure" not in capsys.readouterr().out
    save(out / "checkpoint-30", 30)
    log = measure(out)
    assert f"{20 * GRID.rows} rows to measure" in capsys.readouterr().out
    assert [s.step for s in log.snapshots] == [10, 20, 30]
    assert [round(s.lr_sum, 6) for s in log.snapshots] == [1.0, 1.0, 1.0]  # 10 steps at 0.1
    assert len(log.sessions) == 1


def test_rates_of_further_checkpoints_go_on_from_the_last_one_even_if_that_is_gone(out: Path) -> None:
    measure(out, 2)
    save(out / "checkpoint-30", 30, lr=0.3)
    log = measure(out, 2, "checkpoint-30")
    assert [round(s.lr_sum, 6) for s in log.snapshots] == [1.0, 1.0, 2.0]  # 10 steps, from 0.1 to 0.3
    assert len(log.probe) == 2 * 3 * GRID.rows


def test_learning_rates_that_not_every_checkpoint_tells_are_equal(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(out / "checkpoint-50", 50, lr=None)
    log = measure(out, 2)
    assert [s.lr_sum for s in log.snapshots] == [1, 1, 1]
    assert "checkpoints count equally" in capsys.readouterr().out
    save(out / "checkpoint-15", 15)  # between others: no sum changes
    assert [s.step for s in measure(out, 2).snapshots] == [10, 15, 20, 50]


def test_checkpoints_that_moved_are_found_again_and_changed_ones_are_refused(out: Path) -> None:
    log = measure(out, 3)
    (out / "checkpoint-10").rename(out / "moved-10")
    question = {"objective": OBJECTIVE, "model": TinyDenoiser()}
    with pytest.raises(MovedCheckpointError, match="is not there any more"):
        diffhook.query(log, IMAGES[:2], "q", **question)
    assert any("is not there any more" in line for line in log.verify())
    assert describe(log)["checkpoints that are not there"] == [10]
    log = measure(out, 3, "*-?0")
    assert log.snapshots[0].reference is not None
    assert log.snapshots[0].reference.path == str(out / "moved-10")
    assert log.verify() == []
    assert len(diffhook.query(log, IMAGES[:2], "q", **question)) == 2 * 2 * GRID.rows
    assert main(["compact", str(out / "log"), "--out", str(out / "copy")]) == 0
    copy = diffhook.open_log(out / "copy")
    assert [s.reference for s in copy.snapshots] == [s.reference for s in log.snapshots]
    assert len(copy.probe) == len(log.probe)
    torch.save(TinyDenoiser().state_dict(), out / "checkpoint-20" / "model.bin")
    with pytest.raises(MovedCheckpointError, match="its SHA-256 has changed"):
        diffhook.query(log, IMAGES[:2], "p", **question)
    (out / "checkpoint-20").rename(out / "other-20")
    with pytest.raises(LogError, match="is not the checkpoint of step 20"):
        measure(out, 3, "*-?0")


def test_a_checkpoint_that_is_gone_does_not_keep_the_others_from_being_measured(
    out: Path,
) -> None:
    measure(out, [0])
    (out / "checkpoint-10").rename(out / "away")
    with pytest.raises(LogError, match="is not there any more"):
        measure(out, [0, 1])
    log = diffhook.open_log(out / "log")
    assert sorted(zip(log.probe["step"].tolist(), log.probe["sample"].tolist(), strict=True)) == [
        (10, 0), (10, 0), (20, 0), (20, 0), (20, 1), (20, 1),
    ]  # fmt: skip


def test_other_arguments_are_refused_and_nothing_is_written(out: Path) -> None:
    log = measure(out, 3)
    rows = len(log.probe)
    save(out / "checkpoint-15", 15)
    with pytest.raises(LogError, match="step 15 lies before that of step 20"):
        measure(out, 3)
    with pytest.raises(LogError, match=r"another configuration: probe\.grid\.timesteps"):
        measure(out, 3, "checkpoint-?0", grid=diffhook.Grid(3))
    with pytest.raises(LogError, match=r"another configuration: probe\.weight"):
        measure(out, 3, "checkpoint-?0", train_batch_size=4)
    with pytest.raises(LogError, match=r"another dataset: sample 0 is '00\.png' there and 'a\.png' here"):
        measure(out, 3, "checkpoint-?0", names={0: "a.png"})
    with pytest.raises(LogError, match="another configuration"):
        measure(out, 3, "checkpoint-?0", layers="inward")
    assert len(log.refresh().probe) == rows
    assert [s.step for s in log.snapshots] == [10, 20]


def test_other_pictures_of_the_same_names_are_refused_and_shifted_ones_are_not(out: Path) -> None:
    measure(out, 16)
    with pytest.raises(LogError, match="another dataset, or to one that was prepared otherwise"):
        measure(out, images=torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 + 1)
    shifted = IMAGES.roll(1, -1)  # as an augmentation would
    assert len(measure(out, 17, images=shifted).probe) > 16 * 2 * GRID.rows


def test_the_log_of_a_watched_run_is_left_alone(out: Path) -> None:
    train(out / "log", projection_dim=16, epochs=1)
    with pytest.raises(LogError, match="is of a training that was watched"):
        measure(out, 3)


def test_a_checkpoint_of_another_model_is_told_before_anything_is_written(out: Path) -> None:
    torch.save(TinyDenoiser(8).state_dict(), out / "checkpoint-20" / "model.bin")
    with pytest.raises(ConfigurationError, match="checkpoint of another model"):
        measure(out, 3)
    save(out / "checkpoint-30", 30)
    with pytest.raises(ConfigurationError, match="the model cannot take these samples"):
        measure(out, 3, "checkpoint-30", images=torch.zeros(20, 3, 8, 8))
    assert not (out / "log" / "zarr.json").exists()
