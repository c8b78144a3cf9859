"""Trainers that people use, by README.md's commands: rows by file name, and the training as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

import diffhook
from diffhook.analysis.roles import regularisation_images
from diffhook.integrations.accelerate import DiffHook
from diffhook.report.images import find_images
from tests.integrations.trainers import TRAINERS, Trainer
from tests.integrations.trainers.commands import COMMANDS, install, run, start
from tests.integrations.trainers.onetrainer import OneTrainer

EPOCHS = 0, 1
TELLING = "ai-toolkit", "sd-scripts", "OneTrainer", "SimpleTuner"  # which images are for regularisation
LOG = Path("runs/mine")
Row = tuple[int, str, float, float]  # step, name, timestep, norm


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def logged() -> list[Row]:
    found = diffhook.open_log(LOG)
    names, table = found.names(), found.train
    columns = [table[name].tolist() for name in ("step", "sample", "timestep", "grad_norm")]
    return sorted((s, names[i], t, n) for s, i, t, n in zip(*columns, strict=True))


def assert_same(found: list[Row], expected: list[Row]) -> None:
    assert [row[:2] for row in found] == [row[:2] for row in expected]
    np.testing.assert_array_equal(np.float32([r[2] for r in found]), np.float32([r[2] for r in expected]))
    np.testing.assert_allclose([r[3] for r in found], [r[3] for r in expected], rtol=1e-5)


def test_every_trainer_has_a_command() -> None:
    assert COMMANDS.keys() >= TRAINERS.keys()


@pytest.mark.parametrize("name", TRAINERS)
def test_rows_are_a_batch_1_loops_by_file_name_and_the_training_is_bit_identical(name: str) -> None:
    install(TRAINERS[name], Path())
    plain = TRAINERS[name](EPOCHS)
    plain.train()
    assert run(name, *TRAINERS[name].arguments(EPOCHS)) == 0
    watched = Trainer.last
    left = watched.trained.state_dict()
    assert all(torch.equal(value, left[key]) for key, value in plain.trained.state_dict().items())
    expected = watched.expected(by_stem=name == "musubi-tuner")
    images = 3 if name == "denoising-diffusion-pytorch" else 5
    assert len({row[1] for row in expected}) == images, (
        "captions, repeats and flips of an image are one sample"
    )
    assert_same(logged(), expected)
    log = diffhook.open_log(LOG)
    told = {log.names()[sample] for sample in regularisation_images(log)}
    assert told == ({"photos/reg/d.png", "photos/reg/e.png"} if name in TELLING else set())


def test_adapters_that_nobody_prepares_are_found_in_the_frozen_model_that_runs_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As SimpleTuner trains LyCORIS."""
    monkeypatch.setattr(TRAINERS["SimpleTuner"], "low_rank", True)
    install(TRAINERS["SimpleTuner"], Path())
    assert run("SimpleTuner", *TRAINERS["SimpleTuner"].arguments(EPOCHS)) == 0
    assert_same(logged(), Trainer.last.expected())


@pytest.mark.parametrize("name", TRAINERS)
def test_a_run_that_goes_on_from_a_checkpoint_has_the_rows_of_one_that_was_left_alone(name: str) -> None:
    kind = TRAINERS[name]
    install(kind, Path())
    assert run(name, *kind.arguments(EPOCHS)) == 0
    alone = logged()
    LOG.rename("runs/alone")
    assert run(name, *kind.arguments([0], save="checkpoint")) == 0
    assert run(name, *kind.arguments([1], checkpoint="checkpoint")) == 0
    assert_same(logged(), alone)


@pytest.mark.parametrize("name", TRAINERS)
def test_the_page_shows_each_samples_own_file(name: str) -> None:
    """Names are paths; musubi-tuner's lack the suffix."""
    install(TRAINERS[name], Path())
    files = ["a", "b", "c", "reg/d", "reg/e"]
    for shade, file in enumerate(files):
        Path("photos", file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 40 * shade).save(f"photos/{file}.png")
    assert run(name, *TRAINERS[name].arguments(EPOCHS)) == 0
    names = diffhook.open_log(LOG).names()
    images = find_images("photos", np.array(list(names)), names)
    assert images is not None
    shades = {
        name.removesuffix(".png"): images(sample).getpixel((0, 0)) // 40 for sample, name in names.items()
    }
    trained = files[:3] if name == "denoising-diffusion-pytorch" else files  # which has no regularisation
    assert shades == {f"photos/{file}": shade for shade, file in enumerate(trained)}


@pytest.mark.parametrize("name", ["sd-scripts", "musubi-tuner"])
def test_names_are_the_rows_where_a_worker_reshuffles_ready_made_batches(name: str) -> None:
    install(TRAINERS[name], Path())
    assert run(name, *TRAINERS[name].arguments(EPOCHS), "--workers", "1") == 0
    assert_same(logged(), Trainer.last.expected(by_stem=name == "musubi-tuner"))


def test_without_the_recipe_ready_made_batches_are_refused_with_what_to_do(
    caplog: pytest.LogCaptureFixture,
) -> None:
    install(TRAINERS["musubi-tuner"], Path())
    start(["diffhook", "run", "--log", str(LOG), "qwen_image_train_network.py", "--epochs", "0"])
    assert not LOG.exists()
    assert caplog.text.count("an item of the dataset is a batch already") == 1


def test_simpletuners_prefetch_is_told_at_its_first_batch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kind = TRAINERS["SimpleTuner"]
    monkeypatch.setattr(kind, "dataloader_prefetch", True)
    install(kind, Path())
    assert run("SimpleTuner", *kind.arguments(EPOCHS)) == 0
    assert not LOG.exists()
    assert "--dataloader_prefetch" in caplog.records[0].message
    assert caplog.text.count("--dataloader_prefetch") == 1


def test_onetrainers_fused_back_pass_is_refused_before_the_first_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(OneTrainer, "fused_back_pass", True)
    install(OneTrainer, Path())
    assert run("OneTrainer", *OneTrainer.arguments(EPOCHS)) != 0
    assert not Trainer.last.visits


def test_a_prepared_loader_that_ends_as_garbage_says_nothing_of_the_trainers_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Such as that of a training that came before in the same process."""
    kind = TRAINERS["SimpleTuner"]
    install(kind, Path())
    accelerator = Accelerator(cpu=True)
    with DiffHook(accelerator, "runs/before"):
        left = iter(accelerator.prepare(DataLoader(TensorDataset(torch.zeros(4)), 1)))
        next(left)
    prepared, loaders = kind.prepared, [left]
    del left

    def prepared_meanwhile(trainer: Any, batch: Any) -> Any:
        loaders.clear()
        return prepared(trainer, batch)

    monkeypatch.setattr(kind, "prepared", prepared_meanwhile)
    assert run("SimpleTuner", *kind.arguments(EPOCHS)) == 0
    assert_same(logged(), Trainer.last.expected())
