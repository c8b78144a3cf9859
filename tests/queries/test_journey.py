"""An image asked about along the path on which it was generated, against autograd at each timestep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
)
from torch import Tensor, nn

import diffhook
from diffhook.capture import DiffusionObjective
from diffhook.capture.model.pipeline import SavedPipeline
from diffhook.capture.objective.noise import noise_bank, noise_seed
from diffhook.capture.objective.schedulers import make_scheduler
from diffhook.errors import ConfigurationError
from diffhook.queries.rebuilt import build_model
from tests.pipelines import lora_run
from tests.twins import sample_gradients

GRID = diffhook.Grid(4, replicates=2)
TEXTS = ["a cat", "the red sea"]


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lora_run(tmp_path_factory.mktemp("lora"))


def generated(
    lora: Path, scheduler: Any = DDIMScheduler, ranges: int = 2, given: list[Tensor] | None = None
) -> diffhook.Trajectory:
    """Args: given: gets what the denoiser is given, step by step."""
    pipe = StableDiffusionPipeline.from_pretrained(lora / "pipeline")
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    path = diffhook.Trajectory(ranges)
    if given is not None:
        pipe.unet.register_forward_pre_hook(lambda _, args: given.append(args[0].clone()))
    pipe(
        TEXTS, num_inference_steps=8, generator=torch.Generator().manual_seed(0), output_type="latent",
        callback_on_step_end=path, callback_on_step_end_tensor_inputs=path.inputs(pipe), height=16, width=16,
    )  # fmt: skip
    return path


def test_each_row_is_the_gradient_at_the_sample_expected_there(lora: Path) -> None:
    path = generated(lora)
    assert [len(samples) for _, samples in path.points] == [2] * 8
    log, pipeline = diffhook.open_log(lora / "log"), SavedPipeline(lora / "pipeline", "cpu")
    table = diffhook.query(log, path, "journey", pipeline=pipeline, grid=GRID)
    assert sorted(set(table["sample"].tolist())) == [0, 1, 2, 3]
    assert len(table) == 2 * 2 * 4 * 2  # snapshots, images, timesteps, replicates
    schedule = DDPMScheduler.from_config(pipeline.pipe.scheduler.config)
    kept = schedule.alphas_cumprod
    model: Any = build_model(log, pipeline).eval()
    _put(model, log.snapshots[-1])
    conditions = path.conditions["encoder_hidden_states"]
    last = table["step"] == log.snapshots[-1].step
    for t in sorted(set(table["timestep"].tolist())):
        at, noisy = min(path.points, key=lambda point: abs(point[0] - t))
        with torch.no_grad():
            told = torch.full((2,), int(at))
            noise = model(noisy, told, conditions).sample
        expected = (noisy - (1 - kept[int(at)]).sqrt() * noise) / kept[int(at)].sqrt() if at else noisy
        for row in np.flatnonzero(last & (table["timestep"] == t)).tolist():
            image, number = divmod(int(table["sample"][row]), 2)
            assert number == (t > 500)
            clean, text = expected[image : image + 1], conditions[image : image + 1]
            drawn = noise_bank(torch.tensor([table["noise_seed"][row]]), clean)
            gradient = sample_gradients(model, _loss(schedule), (clean, text, drawn, torch.tensor([int(t)])))
            assert table["grad_norm"][row] == pytest.approx(float(gradient.norm()), rel=1e-4)


def _put(model: nn.Module, snapshot: Any) -> None:
    import safetensors.torch

    state = safetensors.torch.load(snapshot.parameters())
    assert not model.load_state_dict(state, strict=False).unexpected_keys


def _loss(schedule: Any) -> Any:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        clean, text, noise, timesteps = batch
        predicted = model(schedule.add_noise(clean, noise, timesteps), timesteps, text).sample
        return (predicted - noise).square().flatten(1).mean(1)

    return loss


def test_a_path_shares_its_noise_with_the_grid_and_weighs_as_one_query(lora: Path) -> None:
    log, pipeline = diffhook.open_log(lora / "log"), SavedPipeline(lora / "pipeline", "cpu")
    path = generated(lora, ranges=1)
    table = diffhook.query(log, path, "whole", pipeline=pipeline, grid=GRID, against="probe")
    for t, r, seed in zip(table["timestep"], table["replicate"], table["noise_seed"], strict=True):
        assert seed == noise_seed(0, int(t), int(r))
    for query in (0, 1):
        mine = (table["sample"] == query) & (table["step"] == log.snapshots[0].step)
        assert table["weight"][mine].sum() == pytest.approx(1)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler])
def test_points_are_what_the_denoiser_is_given(lora: Path, scheduler: Any) -> None:
    """Euler's samples are scaled before they are; PNDM visits a timestep twice."""
    given: list[Tensor] = []
    path = generated(lora, scheduler, given=given)
    assert len(path.points) == len(given)
    for (_, point), inputs in zip(path.points, given[1:], strict=False):
        torch.testing.assert_close(point, inputs[:2])
    assert path.points[-1][0] == 0


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow_prediction"])
def test_a_perfect_prediction_implies_the_clean_sample(kind: str) -> None:
    name = "FlowMatchEulerDiscreteScheduler" if kind == "flow_prediction" else "DDPMScheduler"
    told = {} if kind == "flow_prediction" else {"prediction_type": kind}
    how = DiffusionObjective(make_scheduler(name, told)).parametrization
    clean, noise = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4)
    timesteps = torch.tensor([5, 400, 900])
    output = how.target(clean, noise, timesteps)
    found = how.clean(how.noisy(clean, noise, timesteps), output, timesteps)
    torch.testing.assert_close(found, clean, rtol=1e-3, atol=1e-3)


def test_a_path_that_tells_nothing_is_refused(lora: Path) -> None:
    log, pipeline = diffhook.open_log(lora / "log"), SavedPipeline(lora / "pipeline", "cpu")
    with pytest.raises(ConfigurationError, match="the trajectory is empty"):
        diffhook.query(log, diffhook.Trajectory(), "none", pipeline=pipeline)
    with pytest.raises(ConfigurationError, match="4 ranges of 2 timesteps"):
        diffhook.query(log, generated(lora, ranges=4), "none", pipeline=pipeline, grid=diffhook.Grid(2))
    twice = generated(lora)
    twice.points += twice.points
    with pytest.raises(ConfigurationError, match="holds several paths"):
        diffhook.query(log, twice, "none", pipeline=pipeline)
