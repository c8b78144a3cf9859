"""The loss that probes and queries differentiate."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

from diffhook.capture.distance import Distance, Squared


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


@runtime_checkable
class Objective(Protocol):
    """The training loss, sample by sample, at timesteps and noise that the caller chooses.

    :class:`diffhook.DiffusionObjective` makes one from a diffusers scheduler; any object of this
    shape will do. One whose training does not draw timesteps evenly from [0, T) may have a method
    ``schedule(positions) -> timesteps`` besides, see :meth:`DiffusionObjective.schedule`.
    """

    @property
    def num_timesteps(self) -> int:
        """T: timesteps run from 0 to T − 1."""
        ...

    def __call__(self, model: nn.Module, batch: Any, timesteps: Tensor, noise_seeds: Tensor) -> Tensor:
        """Losses, (B,), with gradients.

        Args:
            model: the trained model.
            batch: a collated batch of B samples, on the model's device.
            timesteps: (B,) int64, or float32 where the schedule has fractions.
            noise_seeds: (B,) int64 on the CPU; equal seeds mean equal noise.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """What the loss is, as JSON: part of the log's identity."""
        ...
