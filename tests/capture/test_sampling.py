"""Sampling by seeds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

import diffhook
from diffhook.capture.model.sampling import sample
from tests.models import unet

SCHEDULERS = {
    "DDPM": DDPMScheduler(),
    "DDIM": DDIMScheduler(),
    "flow": FlowMatchEulerDiscreteScheduler(shift=2.0),
}


class Knowing(nn.Module):
    """Predicts as if every sample were 0.25."""

    def __init__(self, objective: diffhook.DiffusionObjective) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))
        self.objective = objective

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        told = timestep / self.objective.timestep_scale
        kind, clean = self.objective.parametrization, torch.full_like(sample, 0.25)
        told = told if kind.name == "flow_prediction" else told.long()
        base = kind.noisy(clean, torch.zeros_like(clean), told)
        share = kind.noisy(torch.zeros_like(clean), torch.ones_like(clean), told)
        return kind.target(clean, (sample - base) / share, told)


@pytest.mark.parametrize(
    ("scheduler", "options"),
    [
        ("DDIM", {}),
        ("DDIM", {"prediction_type": "v_prediction"}),
        ("DDPM", {"prediction_type": "sample"}),
        ("flow", {"timestep_scale": 1 / 1000}),
    ],
)
def test_a_model_that_knows_the_sample_makes_it(scheduler: str, options: dict[str, Any]) -> None:
    objective = diffhook.DiffusionObjective(SCHEDULERS[scheduler], **options)
    found = sample(Knowing(objective), objective, (1, 4, 4), [0, 1], 10)
    torch.testing.assert_close(found, torch.full((2, 1, 4, 4), 0.25), atol=2e-3, rtol=0)


@pytest.mark.parametrize("scheduler", list(SCHEDULERS))
def test_a_seed_gives_the_same_sample_in_any_company(scheduler: str) -> None:
    objective, model = diffhook.DiffusionObjective(SCHEDULERS[scheduler]), unet().model.eval()
    together = sample(model, objective, (1, 16, 16), [3, 4, 5], 3)
    alone = sample(model, objective, (1, 16, 16), [4], 3)
    torch.testing.assert_close(together[1:2], alone, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(together[0], together[1])
