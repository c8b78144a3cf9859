"""The loss that probes and queries differentiate."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn


@runtime_checkable
class Objective(Protocol):
    """The training loss, sample by sample, at timesteps and noise that the caller chooses.

    ``diffhook.integrations.diffusers.DiffusionObjective`` makes one from a diffusers scheduler; any
    object of this shape will do.
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
            timesteps: (B,) int64.
            noise_seeds: (B,) int64 on the CPU; equal seeds mean equal noise.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """What the loss is, as JSON: part of the log's identity."""
        ...
