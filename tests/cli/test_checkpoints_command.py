"""`diffhook checkpoints` from end to end, and then everything that works offline; and wrong use."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import get_peft_model_state_dict
from PIL import Image

import diffhook
from diffhook.cli import main
from tests.models import unet
from tests.pipelines import LORA, SIZE, images, save_stable_diffusion
from tests.runs import SCHEDULER

COUNT = 20
GRID = ("--timesteps", 3, "--projection-dim", 64)


def run(*arguments: Any) -> int:
    return main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an ordinary script leaves of an unconditional model, and its images in folders of classes."""
    root = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    model: Any = unet().model
    DDPMPipeline(model, SCHEDULER).save_pretrained(root / "pipeline")
    data = images(COUNT)[:, :1]
    for index, picture in enumerate(data):
        folder = root / "data" / f"class-{index % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        array = ((picture + 1) * 127.5).round().byte()[0].numpy()
        Image.fromarray(array).save(folder / f"{index:02d}.png")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for step in (1, 2):
        noise, timesteps = torch.randn(8, 1, SIZE, SIZE), torch.randint(0, 1000, (8,))
        noisy = SCHEDULER.add_noise(data[:8], noise, timesteps)
        (model(noisy, timesteps).sample - noise).square().mean().backward()
        optimizer.step()
        model.save_pretrained(root / f"out/checkpoint-{step}/unet")
        torch.save(optimizer.state_dict(), root / f"out/checkpoint-{step}/optimizer.bin")
    (root / "out/checkpoint-3").mkdir()
    return root


def test_everything_offline_works_on_a_model_that_was_trained_already(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log, data = tmp_path / "log", trained / "data"
    command = ("checkpoints", log, "--pipeline", trained / "pipeline", "--data", data, *GRID)
    for _ in range(2):  # the second time nothing is left to do
        assert run(*command, "--checkpoints", trained / "out/checkpoint-*", "--json") == 0
        done = json.loads(capsys.readouterr().out)
        assert (done["rows"], done["snapshots"]) == (COUNT * 2 * 3 * 2, [1, 2])
    assert run("verify", log) == 0
    assert run("query", log, "--images", data, "--ids", "3,4", "--name", "own") == 0
    capsys.readouterr()
    assert run("influence", log, "--queries", "own", "--top", 1, "--json") == 0
    answers = json.loads(capsys.readouterr().out)["queries"]
    names = diffhook.open_log(log).names()
    assert names[3] == "class-0/06.png"
    scores = diffhook.influence(diffhook.open_log(log), "own")
    assert scores.top(1).sample_ids[:, 0].tolist() == [3, 4], answers
    assert run("outliers", log) == 0
    assert run("report", log, "--images", data, "--out", tmp_path / "page.html") == 0
    page = (tmp_path / "page.html").read_text()
    assert "class-0/06.png" in page
    assert "at 2 checkpoints, after the training" in page
    assert "or was killed" not in page
    capsys.readouterr()
    assert run("info", log) == 0
    told = capsys.readouterr().out
    assert "the places of the checkpoints" in " ".join(told.split())


def test_a_lora_of_another_model_and_missing_captions_leave_no_log(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = save_stable_diffusion(tmp_path / "sd")
    pipe = diffhook.SavedPipeline(pipeline, "cpu").pipe
    pipe.unet.add_adapter(LORA)
    weights = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet))
    for step in (1, 2):
        type(pipe).save_lora_weights(tmp_path / f"lora-{step}", unet_lora_layers=weights)
    command = ("checkpoints", tmp_path / "log", "--checkpoints", tmp_path / "lora-*", *GRID)
    asked = ("--data", trained / "data", "--samples", 2)
    assert run(*command, *asked, "--pipeline", trained / "pipeline") == 2
    assert "the adapter is not of this model: the UNet2DModel has no layers" in capsys.readouterr().err
    assert run(*command, *asked, "--pipeline", pipeline) == 2
    assert "takes captions: give one per image" in capsys.readouterr().err
    assert not (tmp_path / "log" / "zarr.json").exists()
    assert run(*command, *asked, "--pipeline", pipeline, "--caption", "a cat", "--lora-alpha", 6) == 0
    out = capsys.readouterr().out
    assert "adapter of rank 2, alpha 6" in out
    assert "count equally" in out
    log = diffhook.open_log(tmp_path / "log")
    assert np.isfinite(log.probe["grad_norm"]).all()
    assert (log.probe["grad_norm"] > 0).all()


def test_files_that_cannot_be_read_are_told_before_the_plan(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained / "data", tmp_path / "data")
    (tmp_path / "data/class-0/dangling.png").symlink_to("nowhere.png")
    whole = (tmp_path / "data/class-1/01.png").read_bytes()
    (tmp_path / "data/class-1/01.png").write_bytes(whole[: len(whole) // 2])
    command = (
        "checkpoints",
        tmp_path / "log",
        "--pipeline",
        trained / "pipeline",
        "--data",
        tmp_path / "data",
    )
    assert run(*command, "--checkpoints", trained / "out/checkpoint-*", *GRID) != 0
    told = capsys.readouterr()
    assert f"2 image files of {COUNT + 1} in {tmp_path / 'data'} cannot be read" in told.err
    assert (
        "class-0/dangling.png (a link to nowhere.png, which is not there): remove or repair them" in told.err
    )
    assert "rows to measure" not in told.out + told.err
    assert not (tmp_path / "log").exists()
