"""The loss that probes and queries differentiate."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

from torch import Tensor, nn

from diffhook.capture.objective.distance import Distance, Squared
from diffhook.errors import ConfigurationError


class Prediction(NamedTuple):
    """What the model made of a batch, and what it should have made.

    Attributes:
        output: (B, …) the model's prediction.
        target: (B, …) of the same shape, without gradient.
        weights: (B,) factors on the samples' losses.
        distance: of an output's element from its target's.
    """

    output: Tensor
    target: Tensor
    weights: Tensor
    distance: Distance = Squared()

    def losses(self) -> Tensor:
        """(B,) weighted mean distances."""
        return self.distance(self.output - self.target).flatten(1).mean(1) * self.weights


class Objective(ABC):
    """The training loss, sample by sample, at timesteps and noise that the caller chooses.

    :class:`diffhook.DiffusionObjective` makes one from a diffusers scheduler. For another loss inherit from
    this class; :class:`diffhook.capture.testing.ObjectiveContract` tests what must hold of it.

    Attributes:
        timestep_scale: factor on the timestep that the model is told, such as 1/1000 for Flux.
    """

    timestep_scale: float = 1.0

    @property
    @abstractmethod
    def num_timesteps(self) -> int:
        """T: timesteps run from 0 to T − 1."""

    @abstractmethod
    def __call__(self, model: nn.Module, batch: Any, timesteps: Tensor, noise_seeds: Tensor) -> Tensor:
        """Losses, (B,), with gradients.

        Args:
            model: the trained model.
            batch: a collated batch of B samples, on the model's device.
            timesteps: (B,) int64, or float32 where the schedule has fractions.
            noise_seeds: (B,) int64 on the CPU; equal seeds mean equal noise.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What the loss is, as JSON: part of the log's identity."""

    def schedule(self, positions: list[int]) -> list[Any]:
        """The timesteps at positions 0 … T − 1 of the training's schedule: by default themselves."""
        return positions

    @property
    def self_contained(self) -> bool:
        """Whether :meth:`describe` says all there is, so that equal descriptions mean equal losses."""
        return False


class Predicting(Objective):
    """An objective that shows what the model predicts, so that something else of it may be differentiated."""

    @abstractmethod
    def predict(self, model: nn.Module, batch: Any, timesteps: Tensor, noise_seeds: Tensor) -> Prediction:
        """What the model predicts of the noisy batch, and what it should; arguments as in a call."""


def check_objective(objective: Any) -> None:
    """Raises ConfigurationError unless ``objective`` is None or an :class:`Objective`."""
    if objective is None or isinstance(objective, Objective):
        return
    kind = type(objective).__name__
    hint = f": DiffusionObjective({kind.lower()}), say" if hasattr(objective, "add_noise") else ""
    raise ConfigurationError(
        f"objective is a {kind}; expected an Objective, which is called with (model, batch, timesteps, noise "
        f"seeds), such as DiffusionObjective(scheduler){hint}"
    )
