"""Our own objectives keep the contract that we give to others; a wrong one breaks it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

import diffhook
from diffhook.capture.objective import Objective
from diffhook.capture.testing import ObjectiveContract
from tests.runs import TinyDenoiser, identified


class _Contract(ObjectiveContract):
    def objective(self) -> Objective:
        raise NotImplementedError

    def make(self) -> tuple[Objective, nn.Module, Any]:
        torch.manual_seed(0)
        return self.objective(), TinyDenoiser().eval(), {"images": identified(4)}


class TestDiffusion(_Contract):
    def objective(self) -> Objective:
        return diffhook.DiffusionObjective(DDPMScheduler(), weighting=diffhook.MinSNR(5.0))


class TestFlow(_Contract):
    def objective(self) -> Objective:
        return diffhook.DiffusionObjective(FlowMatchEulerDiscreteScheduler(shift=3.0), distance="huber")


class TestMeasured(_Contract):
    def objective(self) -> Objective:
        return diffhook.Measured(diffhook.DiffusionObjective(DDPMScheduler()), "squared-output")


class Careless(diffhook.DiffusionObjective):
    """Adds noise that no seed decides, and takes a mean over the batch."""

    def __call__(self, model: nn.Module, batch: Any, timesteps: Tensor, noise_seeds: Tensor) -> Tensor:
        noisy = batch["images"] + torch.randn_like(batch["images"])
        return super().__call__(model, noisy - noisy.mean(0), timesteps, noise_seeds)


@pytest.mark.parametrize(
    "test", ["test_noise_is_the_seeds_alone", "test_a_samples_loss_does_not_depend_on_the_others"]
)
def test_a_careless_objective_breaks_it(test: str) -> None:
    class Contract(_Contract):
        def objective(self) -> Objective:
            return Careless(DDPMScheduler())

    with pytest.raises(AssertionError):
        getattr(Contract(), test)()


def test_an_objective_must_say_what_it_is() -> None:
    class Silent(Objective):
        num_timesteps = 10

        def __call__(self, *_: Any) -> Tensor:
            raise AssertionError("never called")

    with pytest.raises(TypeError, match="describe"):
        Silent()  # type: ignore[abstract]
