"""In the shape of trainers that people use: every row by its file's name, and the training as it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import diffhook
from tests.integrations.trainers import TRAINERS, Musubi
from tests.integrations.trainers.musubi import BucketBatchManager

EPOCHS = 0, 1
Row = tuple[int, str, float, float]  # step, name, timestep, norm


def logged(log: Path) -> list[Row]:
    found = diffhook.open_log(log)
    names, table = found.names(), found.train
    columns = [table[name].tolist() for name in ("step", "sample", "timestep", "grad_norm")]
    return sorted((s, names[i], t, n) for s, i, t, n in zip(*columns, strict=True))


def assert_same(found: list[Row], expected: list[Row]) -> None:
    assert [row[:2] for row in found] == [row[:2] for row in expected]
    np.testing.assert_array_equal(np.float32([r[2] for r in found]), np.float32([r[2] for r in expected]))
    np.testing.assert_allclose([r[3] for r in found], [r[3] for r in expected], rtol=1e-5)


@pytest.mark.parametrize("name", TRAINERS)
def test_rows_are_a_batch_1_loops_by_file_name_and_the_training_is_bit_identical(
    tmp_path: Path, name: str
) -> None:
    plain = TRAINERS[name](None).train(*EPOCHS)
    watched = TRAINERS[name](tmp_path / "log").train(*EPOCHS)
    left = watched.trained.state_dict()
    assert all(torch.equal(value, left[key]) for key, value in plain.trained.state_dict().items())
    watched.end()
    expected = watched.expected()
    images = 3 if name == "denoising-diffusion-pytorch" else 5
    assert len({row[1] for row in expected}) == images, "a repeated and a flipped image are one sample each"
    assert_same(logged(tmp_path / "log"), expected)


@pytest.mark.parametrize("name", TRAINERS)
def test_a_run_that_goes_on_from_a_checkpoint_has_the_rows_of_one_that_was_left_alone(
    tmp_path: Path, name: str
) -> None:
    alone = TRAINERS[name](tmp_path / "alone").train(*EPOCHS)
    alone.end()
    first = TRAINERS[name](tmp_path / "log").train(0)
    first.save(tmp_path / "checkpoint")
    first.end()
    TRAINERS[name](tmp_path / "log", tmp_path / "checkpoint").train(1).end()
    assert_same(logged(tmp_path / "log"), logged(tmp_path / "alone"))


def test_names_are_the_rows_where_a_worker_reshuffles_ready_made_batches(tmp_path: Path) -> None:
    class InWorkers(Musubi):
        workers = 1

    trainer = InWorkers(tmp_path / "log").train(*EPOCHS)
    trainer.end()
    assert_same(logged(tmp_path / "log"), trainer.expected())


def test_without_the_recipe_ready_made_batches_are_refused_with_what_to_do(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Unnamed(Musubi):
        manager = BucketBatchManager

    Unnamed(tmp_path / "log").train(0).end()
    assert not (tmp_path / "log").exists()
    assert caplog.text.count("an item of the dataset is a batch already") == 1
