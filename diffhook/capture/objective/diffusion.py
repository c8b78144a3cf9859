"""The training loss of a diffusers model, from its scheduler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from diffhook.capture.objective.denoising import denoise
from diffhook.capture.objective.distance import Distance, make_distance
from diffhook.capture.objective.noise import noise_bank
from diffhook.capture.objective.objective import Predicting, Prediction
from diffhook.capture.objective.parametrization import find_parametrization
from diffhook.capture.objective.schedulers import configured, make_scheduler
from diffhook.capture.objective.weighting import Custom, Weighting, make_weighting
from diffhook.capture.samples.inputs import Inputs, default_inputs
from diffhook.errors import ConfigurationError
from diffhook.log.schema import json_like


class DiffusionObjective(Predicting):
    """Weighted mean error of ε-, v-, sample- or flow-prediction.

    Example:
        >>> objective = DiffusionObjective(DDPMScheduler(), weighting=MinSNR(gamma=5.0))

    Timesteps are those that the training would hand to the scheduler: integers for DDPM and its
    kin, σ·T for flow matching, (1 − σ)·T where its time runs from noise to samples.

    Args:
        scheduler: a diffusers scheduler whose ``add_noise`` is √ᾱ x + √(1 − ᾱ) ε (DDPM, DDIM …), or a
            flow-matching one.
        inputs: batch → (clean samples (B, …), keyword arguments of the model such as
            ``{"class_labels": …}``), called on the model's device. By default see
            :func:`diffhook.capture.samples.inputs.default_inputs`.
        prediction_type: "epsilon", "v_prediction", "sample", "flow_prediction", or "flow_to_sample", whose
            timesteps say how much of the sample there is (T: no noise); by default the scheduler's.
        weighting: on the loss: :class:`MinSNR`, "snr", "debiased", "sigma_sqrt", "cosmap", "p2", or a
            function timesteps (B,) → weights (B,), which a log names but cannot bring back.
        noise_offset: so much of one further draw per channel is added to the noise.
        timestep_scale: factor on the timestep that the model is told, such as 1/1000 for Flux.
        distance: of the prediction from its target: "squared", "absolute", "huber", "pseudo_huber", or one
            of :mod:`diffhook.capture.objective.distance`.
        factor: on the whole loss.

    Raises:
        ConfigurationError: an unknown prediction type, weighting or distance, or a scheduler that cannot
            serve it.
    """

    def __init__(
        self,
        scheduler: Any,
        inputs: Inputs = default_inputs,
        *,
        prediction_type: str | None = None,
        weighting: Weighting | str | Callable[[Tensor], Tensor] | None = None,
        noise_offset: float = 0.0,
        timestep_scale: float = 1.0,
        distance: Distance | str | None = None,
        factor: float = 1.0,
    ) -> None:
        self.scheduler = scheduler
        self.inputs = inputs
        self.parametrization = find_parametrization(prediction_type, scheduler)
        self.weighting = make_weighting(weighting)
        self.noise_offset = noise_offset
        self.timestep_scale = timestep_scale
        self.distance = make_distance(distance)
        self.factor = factor

    @property
    def prediction_type(self) -> str:
        return self.parametrization.name

    @property
    def self_contained(self) -> bool:
        """Whether :meth:`describe` says all there is: no function of the user's own takes part."""
        plain = type(self) is DiffusionObjective and self.inputs is default_inputs
        return plain and not isinstance(self.weighting, Custom)

    @property
    def num_timesteps(self) -> int:
        return int(self.scheduler.config.num_train_timesteps)

    def schedule(self, positions: list[int]) -> list[Any]:
        """The timesteps at positions 0 … T − 1 of the training's schedule.

        Positions themselves, but for flow matching, whose resolution shift crowds σ towards noise.
        """
        return self.parametrization.schedule(positions)

    def predict(self, model: nn.Module, batch: Any, timesteps: Tensor, noise_seeds: Tensor) -> Prediction:
        clean, arguments = self.inputs(batch)
        noise = noise_bank(noise_seeds, clean, self.noise_offset)
        noisy = self.parametrization.noisy(clean, noise, timesteps)
        output = self.output(model, noisy, timesteps, arguments)
        exact = torch.promote_types(output.dtype, torch.float32)
        target = self.parametrization.target(clean, noise, timesteps)
        weights = self.factor * self.weighting(timesteps, self.parametrization)
        return Prediction(output.to(exact), target.to(exact), weights.to(exact), self.distance)

    def output(self, model: nn.Module, noisy: Tensor, timesteps: Tensor, arguments: dict[str, Any]) -> Tensor:
        """(B, …) what the model predicts, without variances; arguments as of :meth:`expected`."""
        told = timesteps if self.timestep_scale == 1 else timesteps * self.timestep_scale
        output = predicted_tensor(denoise(model, noisy, told, **arguments))
        if output.dim() > 1 and output.shape[1] == 2 * noisy.shape[1]:
            output = output[:, : noisy.shape[1]]  # the rest are variances, which the loss leaves alone
        return output

    def expected(
        self, model: nn.Module, noisy: Tensor, timesteps: Tensor, arguments: dict[str, Any]
    ) -> Tensor:
        """(B, …) the clean samples that the model expects behind noisy ones.

        Args:
            noisy: (B, …).
            timesteps: (B,), as in a call.
            arguments: of the model besides.
        """
        output = self.output(model, noisy, timesteps, arguments)
        return self.parametrization.clean(noisy, output.to(noisy.dtype), timesteps)

    def __call__(self, model: nn.Module, batch: Any, timesteps: Tensor, noise_seeds: Tensor) -> Tensor:
        return self.predict(model, batch, timesteps, noise_seeds).losses()

    @classmethod
    def from_description(cls, description: dict[str, Any], inputs: Inputs = default_inputs) -> Self:
        """The objective that :meth:`describe` described, from a log's configuration.

        Raises:
            ConfigurationError: it cannot be rebuilt: not one of this class, a weighting of the
                user's own, or a scheduler that is not one of diffusers'.
        """
        if description.get("kind") != "diffusion":
            raise ConfigurationError(
                f"the log's objective is of kind {description.get('kind')!r}, which cannot be rebuilt: "
                "pass it yourself"
            )
        return cls(
            make_scheduler(description["scheduler"], description["scheduler_config"]),
            inputs,
            prediction_type=description["prediction_type"],
            weighting=make_weighting(description["weighting"]),
            noise_offset=description["noise_offset"],
            timestep_scale=description["timestep_scale"],
            distance=make_distance(description["distance"]),
            factor=description["factor"],
        )

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "diffusion",
            "prediction_type": self.prediction_type,
            "weighting": self.weighting.describe(),
            "noise_offset": self.noise_offset,
            "timestep_scale": self.timestep_scale,
            "distance": self.distance.describe(),
            "factor": self.factor,
            "scheduler": type(self.scheduler).__name__,
            "scheduler_config": json_like(configured(self.scheduler)),
        }


def predicted_tensor(output: Any) -> Tensor:
    """The prediction in a model's output: a tensor, a tuple's first element, a dataclass's ``sample``.

    Raises:
        ConfigurationError: none of these.
    """
    found = output[0] if isinstance(output, tuple | list) and output else output
    found = found if isinstance(found, Tensor) else getattr(found, "sample", None)
    if not isinstance(found, Tensor):
        raise ConfigurationError(
            f"the model returned a {type(output).__name__}; expected a tensor, a tuple that begins with one, "
            "or an output with .sample"
        )
    return found
