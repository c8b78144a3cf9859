"""What holds of every objective: tests for a class of your own to inherit.

    class TestMine(ObjectiveContract):
        def make(self):
            return Mine(), MyModel(), {"images": torch.randn(4, 3, 8, 8)}

pytest runs them.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from diffhook.capture.objective import Objective
from diffhook.capture.probes.grid import take
from diffhook.log.schema import json_like

_SEEDS = torch.tensor([7, 8, 7, 9])
_COUNT = len(_SEEDS)


class ObjectiveContract(ABC):
    """Give your objective by :meth:`make`."""

    @abstractmethod
    def make(self) -> tuple[Objective, nn.Module, Any]:
        """The objective, a small model in evaluation mode, and a collated batch of four samples that differ;
        the same ones at each call."""

    def test_it_gives_each_sample_a_finite_loss_with_gradients(self) -> None:
        objective, model, batch = self.make()
        losses = objective(model, batch, self._timesteps(objective), _SEEDS)
        assert losses.shape == (_COUNT,)
        assert losses.isfinite().all()
        losses.sum().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert any(gradient.any() for gradient in gradients), "nothing is differentiated"

    def test_a_samples_loss_does_not_depend_on_the_others(self) -> None:
        objective, model, batch = self.make()
        timesteps = self._timesteps(objective)
        together = objective(model, batch, timesteps, _SEEDS)
        for row in range(_COUNT):
            only = torch.tensor([row])
            alone = objective(model, take(batch, only), timesteps[only], _SEEDS[only])
            torch.testing.assert_close(alone, together[only], rtol=1e-4, atol=1e-6)

    def test_noise_is_the_seeds_alone(self) -> None:
        """Equal seeds, equal losses, whatever was drawn before; another seed, another loss. It draws from no
        random state of the training's."""
        objective, model, batch = self.make()
        timesteps = self._timesteps(objective)
        first = objective(model, batch, timesteps, _SEEDS)
        torch.rand(3)
        before = torch.get_rng_state()
        again, others = (objective(model, batch, timesteps, seeds) for seeds in (_SEEDS, _SEEDS + 100))
        assert torch.equal(torch.get_rng_state(), before), "it draws from torch's random state"
        assert torch.equal(again, first)
        assert (others != first).all(), "the loss does not depend on the noise's seed"

    def test_timesteps_are_those_of_its_schedule(self) -> None:
        objective, model, batch = self.make()
        scheduled = objective.schedule([0, objective.num_timesteps // 2, objective.num_timesteps - 1])
        assert all(0 <= t <= objective.num_timesteps for t in scheduled), scheduled
        early, late = (
            objective(model, batch, torch.tensor([t] * _COUNT), _SEEDS) for t in (scheduled[0], scheduled[-1])
        )
        assert not torch.allclose(early, late), "the loss does not depend on the timestep"

    def test_its_description_is_json_and_stays(self) -> None:
        objective, model, batch = self.make()
        described = objective.describe()
        assert described
        assert json.loads(json.dumps(described)) == json_like(described)
        objective(model, batch, self._timesteps(objective), _SEEDS)
        assert objective.describe() == described
        assert self.make()[0].describe() == described, "equal objectives are described differently"

    def _timesteps(self, objective: Objective) -> Tensor:
        positions = torch.linspace(0, objective.num_timesteps - 1, _COUNT).long().tolist()
        return torch.tensor(objective.schedule(positions))
