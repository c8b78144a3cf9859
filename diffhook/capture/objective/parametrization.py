"""What a model predicts: the noise, the velocity, the sample, or the flow between them.

One class a kind, registered by the name that diffusers has for it.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from diffhook.capture.objective.schedulers import remade
from diffhook.errors import ConfigurationError


class Parametrization(ABC):
    """How clean samples and noise make the model's input and its target.

    Args:
        scheduler: a diffusers scheduler.

    Raises:
        ConfigurationError: the scheduler lacks what this kind needs, or mixes otherwise than this kind.
    """

    name: str
    needs: str  # a method that the scheduler must have

    def __init__(self, scheduler: Any) -> None:
        if not hasattr(scheduler, self.needs):
            raise ConfigurationError(
                f"{type(scheduler).__name__} has no {self.needs}, which {self.name} prediction needs: "
                f"pass another scheduler, or prediction_type= one of {', '.join(PARAMETRIZATIONS)}"
            )
        self.scheduler = scheduler
        self._check_mixing()

    def _check_mixing(self) -> None:
        """Samplers' add_noise is often another one: of unscaled noise, or of timesteps in reverse."""
        if not _keeps_variance(self.scheduler):
            kind = type(self.scheduler).__name__
            raise ConfigurationError(
                f"{kind}.add_noise does not give √ᾱ x + √(1 − ᾱ) ε, which {self.name} prediction is trained "
                f"on: expected DDPMScheduler or DDIMScheduler, such as DDPMScheduler.from_config(scheduler."
                "config), or a flow-matching scheduler"
            )

    def noisy(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """(B, …) the model's input."""
        mixed: Tensor = self.scheduler.add_noise(clean, noise, timesteps)
        return mixed

    @abstractmethod
    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """(B, …) what the model should say."""

    @abstractmethod
    def clean(self, noisy: Tensor, output: Tensor, timesteps: Tensor) -> Tensor:
        """(B, …) the clean samples that an output implies of the model's input."""

    @abstractmethod
    def sample_factor(self, timesteps: Tensor) -> Tensor:
        """(B,) what makes a squared error of the prediction one of the sample that it implies."""

    def schedule(self, positions: list[int]) -> list[Any]:
        """The timesteps at positions 0 … T − 1 of the training's schedule."""
        return positions

    def _shares(self, noisy: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """√ᾱ and √(1 − ᾱ), to be multiplied with samples."""
        kept = self.scheduler.alphas_cumprod.to(noisy.device)[timesteps].view(
            -1, *(1 for _ in noisy.shape[1:])
        )
        return kept.sqrt().to(noisy.dtype), (1 - kept).sqrt().to(noisy.dtype)

    def snr(self, timesteps: Tensor) -> Tensor:
        """(B,) float32 signal-to-noise ratios, ᾱ / (1 − ᾱ), positive."""
        kept = self.scheduler.alphas_cumprod.to(timesteps.device)[timesteps].float()
        return (kept / (1 - kept)).clamp(min=1e-20)  # 0 at the end of some schedules

    def sigmas(self, timesteps: Tensor) -> Tensor:
        """(B,) float32 shares of noise, √(1 − ᾱ)."""
        kept = self.scheduler.alphas_cumprod.to(timesteps.device)[timesteps].float()
        return (1 - kept).sqrt()


class Epsilon(Parametrization):
    """ε-prediction (DDPM, arXiv 2006.11239)."""

    name = "epsilon"
    needs = "add_noise"

    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return noise

    def clean(self, noisy: Tensor, output: Tensor, timesteps: Tensor) -> Tensor:
        kept, lost = self._shares(noisy, timesteps)
        return (noisy - lost * output) / kept

    def sample_factor(self, timesteps: Tensor) -> Tensor:
        return 1 / self.snr(timesteps)


class Velocity(Parametrization):
    """v-prediction, √ᾱ ε − √(1 − ᾱ) x (arXiv 2202.00512)."""

    name = "v_prediction"
    needs = "get_velocity"

    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        velocity: Tensor = self.scheduler.get_velocity(clean, noise, timesteps)
        return velocity

    def clean(self, noisy: Tensor, output: Tensor, timesteps: Tensor) -> Tensor:
        kept, lost = self._shares(noisy, timesteps)
        return kept * noisy - lost * output

    def sample_factor(self, timesteps: Tensor) -> Tensor:
        return 1 / (self.snr(timesteps) + 1)


class Sample(Parametrization):
    """x₀-prediction."""

    name = "sample"
    needs = "add_noise"

    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return clean

    def clean(self, noisy: Tensor, output: Tensor, timesteps: Tensor) -> Tensor:
        return output

    def sample_factor(self, timesteps: Tensor) -> Tensor:
        return torch.ones_like(timesteps, dtype=torch.float32)


class Flow(Parametrization):
    """Flow matching: x_t = (1 − σ) x + σ ε, target ε − x, σ = t / T (arXiv 2210.02747, 2403.03206)."""

    name = "flow_prediction"
    needs = "scale_noise"

    def __init__(self, scheduler: Any) -> None:
        super().__init__(scheduler)
        # The resolution shift is in them. From a fresh scheduler: sampling overwrites its timesteps.
        self._timesteps = remade(scheduler).timesteps.tolist()[::-1]

    def _check_mixing(self) -> None:
        """Nothing to see: :meth:`noisy` mixes by itself."""

    def noisy(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        sigmas = self.sigmas(timesteps).to(clean.dtype).view(-1, *(1 for _ in clean.shape[1:]))
        return (1 - sigmas) * clean + sigmas * noise

    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return noise - clean

    def clean(self, noisy: Tensor, output: Tensor, timesteps: Tensor) -> Tensor:
        return noisy - self.sigmas(timesteps).to(noisy.dtype).view(-1, *(1 for _ in noisy.shape[1:])) * output

    def sample_factor(self, timesteps: Tensor) -> Tensor:
        return self.sigmas(timesteps).square()

    def schedule(self, positions: list[int]) -> list[Any]:
        return [self._timesteps[position] for position in positions]

    def snr(self, timesteps: Tensor) -> Tensor:
        sigmas = self.sigmas(timesteps)
        return ((1 - sigmas) / sigmas).square().clamp(min=1e-20)

    def sigmas(self, timesteps: Tensor) -> Tensor:
        exact = timesteps if timesteps.is_floating_point() else timesteps.to(torch.float32)
        return exact / self.scheduler.config.num_train_timesteps


class FlowToSample(Flow):
    """Flow matching whose time runs from noise to samples: x_t = σ ε + (1 − σ) x, target x − ε, σ = 1 − t / T
    (arXiv 2210.02747 as it was written, 2401.08740)."""

    name = "flow_to_sample"

    def __init__(self, scheduler: Any) -> None:
        super().__init__(scheduler)
        self._timesteps = [scheduler.config.num_train_timesteps - t for t in reversed(self._timesteps)]

    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return clean - noise

    def clean(self, noisy: Tensor, output: Tensor, timesteps: Tensor) -> Tensor:
        return super().clean(noisy, -output, timesteps)

    def sigmas(self, timesteps: Tensor) -> Tensor:
        return 1 - super().sigmas(timesteps)


def _keeps_variance(scheduler: Any) -> bool:
    """Whether add_noise is √ᾱ x + √(1 − ᾱ) ε, seen at the schedule's ends and in its middle."""
    scheduler = copy.deepcopy(scheduler)  # add_noise moves its tensors to where the samples are
    try:
        steps = int(scheduler.config.num_train_timesteps)
        timesteps = torch.tensor([0, steps // 2, steps - 1])
        one, nothing = torch.ones(3, 1, 1, 1), torch.zeros(3, 1, 1, 1)
        kept = torch.as_tensor(scheduler.alphas_cumprod)[timesteps].float()
        clean, noise = (
            torch.as_tensor(scheduler.add_noise(*mixed, timesteps)).flatten().square()
            for mixed in ((one, nothing), (nothing, one))
        )
    except (AttributeError, TypeError, ValueError, LookupError, RuntimeError):
        return False
    found, expected = torch.stack([clean, noise]), torch.stack([kept, 1 - kept])
    return torch.allclose(found, expected, rtol=0, atol=1e-3)


PARAMETRIZATIONS: dict[str, type[Parametrization]] = {
    kind.name: kind for kind in (Epsilon, Velocity, Sample, Flow, FlowToSample)
}


def find_parametrization(name: str | None, scheduler: Any) -> Parametrization:
    """The kind of that name; by default what the scheduler says, and flow for one that says nothing.

    Raises:
        ConfigurationError: no such kind, or the scheduler cannot serve it.
    """
    if name is None:
        name = scheduler.config.get("prediction_type", Flow.name)
    if name not in PARAMETRIZATIONS:
        raise ConfigurationError(
            f"prediction_type is {name!r}; expected one of {', '.join(PARAMETRIZATIONS)}"
        )
    return PARAMETRIZATIONS[name](scheduler)
