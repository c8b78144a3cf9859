"""`diffhook query` of models that are told a class, that take no squares, and that no config describes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import UNet2DModel
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

import diffhook
from diffhook.cli import main
from diffhook.cli.pictures import Pictures
from diffhook.errors import ConfigurationError
from diffhook.integrations.accelerate import DiffHook
from tests.runs import SCHEDULER, train

OBJECTIVE = diffhook.DiffusionObjective(SCHEDULER)
SMALL = ("--timesteps", 1, "--draws", 1)


def small_unet(size: Any, **options: Any) -> UNet2DModel:
    return UNet2DModel(
        sample_size=size, in_channels=1, out_channels=1, block_out_channels=(4, 4), layers_per_block=1,
        norm_num_groups=2, attention_head_dim=2, down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2, **options,
    )  # fmt: skip


def run(*arguments: Any) -> int:
    return main([str(a) for a in arguments])


def save_images(folder: Path, pictures: Tensor) -> Path:
    folder.mkdir()
    for index, picture in enumerate(pictures):
        Image.fromarray(((picture[0].numpy() + 1) * 127.5).round().astype(np.uint8)).save(
            folder / f"{index}.png"
        )
    return folder


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log of a class-conditional UNet, and two images."""
    root = tmp_path_factory.mktemp("told")
    data = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    probe = diffhook.Probe(1, diffhook.Grid(1))
    DiffHook(accelerator, root / "log", strict=True, projection_dim=64, objective=OBJECTIVE, probe=probe)
    model = small_unet(8, num_class_embeds=4)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    items = [{"images": image, "class_labels": index % 4} for index, image in enumerate(data)]
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(items, 3))
    for batch in loader:
        noise, timesteps = torch.randn_like(batch["images"]), torch.randint(0, 1000, (3,))
        noisy = SCHEDULER.add_noise(batch["images"], noise, timesteps)
        predicted = model(noisy, timesteps, class_labels=batch["class_labels"]).sample
        accelerator.backward(F.mse_loss(predicted, noise))
        optimizer.step()
        optimizer.zero_grad()
    accelerator.end_training()
    save_images(root / "images", data[:2])
    return root


def test_images_are_asked_about_with_the_classes_that_the_model_is_told(told: Path) -> None:
    images = ("query", told / "log", "--images", told / "images", *SMALL)
    assert run(*images, "--class-labels", "1,3", "--name", "each") == 0
    assert run(*images, "--class-labels", "3", "--name", "all") == 0
    log = diffhook.open_log(told / "log")
    pixels = [np.asarray(Image.open(file), np.float32) for file in sorted((told / "images").iterdir())]
    batch = {
        "images": torch.from_numpy(np.stack(pixels)[:, None] / 127.5 - 1),
        "class_labels": torch.tensor([1, 3]),
    }
    direct = diffhook.query(log, batch, "direct", grid=diffhook.Grid(1, draws=1))
    each, same = (log.queries[name]["grad_norm"] for name in ("each", "all"))
    np.testing.assert_allclose(each, direct["grad_norm"], rtol=1e-5)
    assert same[1] == pytest.approx(each[1], rel=1e-5)
    assert same[0] != pytest.approx(each[0], rel=1e-3), "the class must count"


def test_samples_are_made_of_the_classes_named_and_asked_about_with_them(
    told: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = ("query", told / "log", "--generate", 2, "--steps", 2, *SMALL, "--name", "made", "--json")
    assert run(*made, "--class-labels", "2,0") == 0
    assert json.loads(capsys.readouterr().out)["class_labels"] == [2, 0]
    log = diffhook.open_log(told / "log")
    assert log.queries["made"].description["samples"]["class_labels"] == [2, 0]
    pair = diffhook.generate(log, 2, steps=2, class_labels=[2, 0], batch_size=1)
    assert pair.batch["class_labels"].tolist() == [2, 0]
    alone = diffhook.generate(log, 1, seed=1, steps=2, class_labels=[0])
    torch.testing.assert_close(pair.images[1:], alone.images)
    other = diffhook.generate(log, 1, seed=1, steps=2, class_labels=[3])
    assert not torch.allclose(alone.images, other.images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "{told}/images"], "class_labels should be provided when .* give them as class_labels"),
        (["--generate", "2", "--steps", "1"], "make samples: class_labels should be .*(--class-labels)"),
        (
            ["--images", "{told}/images", "--class-labels", "1,x"],
            "--class-labels is '1,x'; expected integers",
        ),
        (["--images", "{told}/images", "--class-labels", "1,2,3"], "3 class labels for 2 images"),
        (["--images", "{told}/images", "--class-labels", "9"], "cannot take these queries .*out of range"),
    ],
)
def test_classes_that_do_not_fit_are_one_line_and_status_2(
    told: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [a.format(told=told) for a in arguments]
    assert run("query", told / "log", *given, *SMALL, "--name", "bad") == 2
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    assert re.search(message, shown.strip().splitlines()[-1])


def test_as_many_class_labels_as_samples_are_expected(told: Path) -> None:
    log = diffhook.open_log(told / "log")
    with pytest.raises(ConfigurationError, match="there are 1 class labels for 2 samples"):
        diffhook.generate(log, 2, class_labels=[0])
    with pytest.raises(ConfigurationError, match="by captions, not by class_labels"):
        diffhook.generate(log, 1, class_labels=[0], captions=["a cat"])


def test_files_that_cannot_be_read_are_told_at_once(
    told: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_images(tmp_path / "images", torch.zeros(2, 1, 8, 8))
    (folder / "half.png").write_bytes((folder / "0.png").read_bytes()[:40])
    (folder / "empty.png").touch()
    (folder / "gone.png").symlink_to("nowhere.png")
    query = ("query", told / "log", "--images", folder, "--class-labels", 1, *SMALL, "--name", "unread")
    assert run(*query) == 2
    assert "3 image files of 5 in" in capsys.readouterr().err


def test_images_need_not_be_square(tmp_path: Path) -> None:
    data = torch.rand(4, 1, 8, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    probe = diffhook.Probe(1, diffhook.Grid(1))
    train(
        tmp_path / "log", make_model=lambda: small_unet((8, 16)), data=data, epochs=1, objective=OBJECTIVE,
        probe=probe, projection_dim=64,
    )  # fmt: skip
    images = save_images(tmp_path / "images", data)
    assert run("query", tmp_path / "log", "--images", images, "--name", "own", *SMALL) == 0
    assert run("query", tmp_path / "log", "--generate", 1, "--steps", 1, "--name", "made", *SMALL) == 0
    log = diffhook.open_log(tmp_path / "log")
    direct = diffhook.query(
        log, ((data + 1).mul(127.5).round() / 127.5 - 1,), "direct", grid=diffhook.Grid(1, draws=1)
    )
    np.testing.assert_allclose(log.queries["own"]["grad_norm"], direct["grad_norm"], rtol=1e-5)


@pytest.mark.parametrize(
    ("factor", "dtype", "message"),
    [(255, np.float32, "has floats from 0 to 255; expected"), (65535, np.int64, "integers from 0 to 65535")],
)
def test_images_of_another_range_are_refused_and_those_of_whole_numbers_taken(
    told: Path, tmp_path: Path, factor: int, dtype: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ramp = np.linspace(0, 1, 64).reshape(1, 1, 8, 8)
    np.save(tmp_path / "whole.npy", (ramp * 255).round().astype(np.int64))
    np.save(tmp_path / "other.npy", (ramp * factor).astype(dtype))
    options = ("--class-labels", 1, *SMALL, "--name", "ramp", "--overwrite")
    assert run("query", told / "log", "--images", tmp_path / "whole.npy", *options) == 0
    pixels = Pictures(tmp_path / "whole.npy", 1, (8, 8))[0]
    np.testing.assert_allclose(pixels[0], ramp[0, 0] * 2 - 1, atol=1 / 255)
    assert run("query", told / "log", "--images", tmp_path / "other.npy", *options) == 2
    assert message in capsys.readouterr().err


def test_a_model_without_a_config_names_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "log", epochs=1, projection_dim=64)
    images = save_images(tmp_path / "images", torch.zeros(1, 1, 8, 8))
    assert run("query", tmp_path / "log", "--images", images, "--name", "q") == 2
    assert "tests.runs.TinyDenoiser, without in_channels and sample_size" in capsys.readouterr().err
