"""Another scalar than the loss to differentiate: D-TRAK's and DAS's."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from diffhook.capture.objective.objective import Objective, Predicting
from diffhook.errors import ConfigurationError

MEASUREMENTS = ("squared-output", "mean-output")


class Measured(Objective):
    """An objective that gives a scalar of the model's output in place of the loss.

    For probes and queries: ``diffhook.query(log, samples, "squared", Measured(objective, "squared-output"))``
    keeps gradients of mean(output²), which the method "d-trak" takes on both sides.

    Args:
        objective: says how samples are noised and the model is called.
        measurement: "squared-output" (arXiv 2311.00500) or "mean-output" (arXiv 2410.18639): mean over
            the elements of the model's output, of its square or of itself.

    Raises:
        ConfigurationError: another measurement.
    """

    def __init__(self, objective: Predicting, measurement: str) -> None:
        if measurement not in MEASUREMENTS:
            raise ConfigurationError(f"measurement is {measurement!r}; expected {' or '.join(MEASUREMENTS)}")
        self.objective = objective
        self.measurement = measurement

    @property
    def num_timesteps(self) -> int:
        return self.objective.num_timesteps

    @property
    def self_contained(self) -> bool:
        """Whether :meth:`describe` says all there is, as :class:`diffhook.DiffusionObjective` has it."""
        return type(self) is Measured and self.objective.self_contained

    def schedule(self, positions: list[int]) -> list[Any]:
        """The timesteps at positions of the training's schedule."""
        return self.objective.schedule(positions)

    def __call__(self, model: nn.Module, batch: Any, timesteps: Tensor, noise_seeds: Tensor) -> Tensor:
        """(B,) values of the measurement, with gradients."""
        output = self.objective.predict(model, batch, timesteps, noise_seeds).output.flatten(1)
        return output.square().mean(1) if self.measurement == "squared-output" else output.mean(1)

    def describe(self) -> dict[str, Any]:
        return {**self.objective.describe(), "measurement": self.measurement}
