"""The training loss of a diffusers model, from its scheduler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from diffhook.errors import ConfigurationError
from diffhook.log.schema import json_like

Inputs = Callable[[Any], tuple[Tensor, dict[str, Any]]]
_CLEAN = ("images", "image", "input", "pixel_values", "latents", "img")


def default_inputs(batch: Any) -> tuple[Tensor, dict[str, Any]]:
    """The clean samples of a batch: itself, its first element, or a well-known key.

    Raises:
        ConfigurationError: none of these is a tensor.
    """
    if isinstance(batch, Tensor):
        return batch, {}
    if isinstance(batch, dict):
        for key in _CLEAN:
            if isinstance(batch.get(key), Tensor):
                return batch[key], {}
        raise ConfigurationError(
            f"the batch has keys {sorted(map(str, batch))}, none of {', '.join(_CLEAN)}: pass "
            "inputs=lambda batch: (clean_samples, model_arguments)"
        )
    if isinstance(batch, tuple | list) and batch and isinstance(batch[0], Tensor):
        return batch[0], {}
    raise ConfigurationError(
        f"cannot find clean samples in a batch of type {type(batch).__name__}: pass "
        "inputs=lambda batch: (clean_samples, model_arguments)"
    )


class DiffusionObjective:
    """Mean squared error of ε-, v- or sample-prediction, as the scheduler defines the target.

    Example:
        >>> objective = DiffusionObjective(DDPMScheduler(num_train_timesteps=1000))

    Args:
        scheduler: a diffusers scheduler with ``add_noise`` (DDPM, DDIM …).
        inputs: batch → (clean samples (B, …), keyword arguments of the model such as
            ``{"class_labels": …}``), called on the model's device. By default the batch itself, its
            first element, or a key such as "images" or "pixel_values".
        prediction_type: "epsilon", "v_prediction" or "sample"; by default the scheduler's.
        weighting: timesteps (B,) → weights (B,) on the loss, such as min-SNR's.

    Raises:
        ConfigurationError: an unknown prediction type.
    """

    def __init__(
        self,
        scheduler: Any,
        inputs: Inputs = default_inputs,
        *,
        prediction_type: str | None = None,
        weighting: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.inputs = inputs
        self.prediction_type = prediction_type or scheduler.config.prediction_type
        self.weighting = weighting
        if self.prediction_type not in ("epsilon", "v_prediction", "sample"):
            raise ConfigurationError(
                f"prediction_type is {self.prediction_type!r}; expected 'epsilon', 'v_prediction' or 'sample'"
            )

    @property
    def num_timesteps(self) -> int:
        return int(self.scheduler.config.num_train_timesteps)

    def __call__(self, model: nn.Module, batch: Any, timesteps: Tensor, noise_seeds: Tensor) -> Tensor:
        clean, arguments = self.inputs(batch)
        noise = noise_bank(noise_seeds, clean)
        noisy = self.scheduler.add_noise(clean, noise, timesteps)
        predicted = model(noisy, timesteps, return_dict=False, **arguments)[0]
        losses = (predicted - self._target(clean, noise, timesteps)).square().flatten(1).mean(1)
        return losses if self.weighting is None else losses * self.weighting(timesteps)

    def _target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return clean
        velocity: Tensor = self.scheduler.get_velocity(clean, noise, timesteps)
        return velocity

    @classmethod
    def from_description(cls, description: dict[str, Any], inputs: Inputs = default_inputs) -> Self:
        """The objective that :meth:`describe` described, from a log's configuration.

        Raises:
            ConfigurationError: it cannot be rebuilt: a weighting of the user's own, or a scheduler
                that is not one of diffusers'.
        """
        if description.get("weighting"):
            raise ConfigurationError(
                f"the log's loss has a weighting of its own ({description['weighting']}): pass the "
                "objective yourself"
            )
        scheduler = make_scheduler(description["scheduler"], description["scheduler_config"])
        return cls(scheduler, inputs, prediction_type=description["prediction_type"])

    def describe(self) -> dict[str, Any]:
        weighting = self.weighting
        return {
            "kind": "diffusion",
            "prediction_type": self.prediction_type,
            "weighting": getattr(weighting, "__qualname__", str(weighting)) if weighting else None,
            "scheduler": type(self.scheduler).__name__,
            "scheduler_config": json_like(
                {k: v for k, v in dict(self.scheduler.config).items() if not k.startswith("_")}
            ),
        }


def noise_bank(seeds: Tensor, like: Tensor) -> Tensor:
    """Gaussian noise of the samples' shape, one draw a seed; equal seeds give equal noise.

    Drawn on the CPU, so that every device sees the same.
    """
    draws: dict[int, Tensor] = {}
    for seed in seeds.tolist():
        if seed not in draws:
            generator = torch.Generator().manual_seed(seed)
            draws[seed] = torch.randn(like.shape[1:], generator=generator)
    bank = torch.stack([draws[seed] for seed in seeds.tolist()])
    return bank.to(device=like.device, dtype=like.dtype)


def make_scheduler(name: str, config: dict[str, Any]) -> Any:
    """One of diffusers' schedulers by class name.

    Raises:
        ConfigurationError: diffusers has no such scheduler.
    """
    import diffusers

    kind = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    if not isinstance(kind, type) or not hasattr(kind, "from_config"):
        raise ConfigurationError(f"diffusers has no scheduler {name!r}")
    return kind.from_config(config)
