"""Noise that a loop mixes by a table of its own is recognised where the batch shows what is noised."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler

from diffhook.capture.recognition import Recognised, Recognition, Refusal
from tests.capture.losses import Loss, recognise

# Tables that public code keeps, and what the model is told for one step.
OWN: dict[str, tuple[Any, float]] = {
    "linear": (DDPMScheduler(), 1.0),
    "stretched": (DDPMScheduler(100, beta_start=1e-3, beta_end=0.2), 10.0),
    "cosine": (DDPMScheduler(4000, beta_schedule="squaredcos_cap_v2"), 0.25),
    "in roots": (DDPMScheduler(beta_schedule="scaled_linear"), 1 / 1000),
    "few steps": (DDPMScheduler(50), 1.0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("predicts", ["epsilon", "v"])
@pytest.mark.parametrize("schedule", OWN)
def test_a_table_of_the_loops_own_is_known_by_the_rows_of_its_batches(
    schedule: str, predicts: str, dtype: torch.dtype
) -> None:
    scheduler, scale = OWN[schedule]
    loss = Loss(scheduler, predicts, told_scale=scale, own=True, shown="itself", variance=predicts == "v")
    found = recognise(loss, dtype=dtype)
    assert isinstance(found, Recognised), found
    assert found.prediction_type.startswith(predicts)
    assert torch.equal(found.scheduler.alphas_cumprod, scheduler.alphas_cumprod)
    assert found.timestep_scale == pytest.approx(scale)
    assert isinstance(found.weighting, type(recognise(Loss(DDPMScheduler())).weighting))


def test_rows_of_noise_alone_wait_for_others_to_show_their_schedule() -> None:
    loss, recognition = Loss(DDPMScheduler(), own=True, shown="itself"), Recognition()
    draw = torch.Generator().manual_seed(0)
    last = loss.observe(draw, 400)
    late = last.told > 980
    assert int(late.sum()) > 3
    only = {name: getattr(last, name)[late] for name in ("given", "told", "output", "gradient", "images")}
    assert last.error_norms is not None
    assert recognition.add(replace(last, **only, error_norms=last.error_norms[late])) is None
    clean = [recognition.add(loss.observe(draw, 1)) for _ in range(80)][-1]
    assert clean is not None
    assert isinstance(recognition.verdict, Recognised), recognition.verdict
    assert torch.equal(recognition.verdict.scheduler.alphas_cumprod, DDPMScheduler().alphas_cumprod)


@pytest.mark.parametrize(
    ("reason", "scheduler", "odd"),
    [
        ("unmixed", DDPMScheduler(), {"shown": ""}),
        ("unmixed", DDPMScheduler(), {"shown": "another"}),
        ("unmixed", DDPMScheduler(), {"perturbation": 0.1}),
        ("unmixed", DDPMScheduler(), {"predicts": "sample"}),
        ("unmixed", DDPMScheduler(), {"distance": "absolute"}),
        ("schedule", DDPMScheduler(beta_end=0.021), {}),
        ("schedule", DDPMScheduler(990), {}),
        ("schedule", DDPMScheduler(), {"told_scale": 0.7}),
        ("noise", DDPMScheduler(), {"colour": True}),
        ("weights", DDPMScheduler(), {"weighting": "sines"}),
    ],
)
def test_a_table_of_the_loops_own_that_is_not_shown_is_refused(
    reason: str, scheduler: Any, odd: dict[str, Any]
) -> None:
    found = recognise(Loss(scheduler, own=True, **{"shown": "itself", **odd}))
    assert found == Refusal(reason)
    assert "objective=" in found.words
