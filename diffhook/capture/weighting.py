"""Weights on the loss, by timestep. One class a kind, registered by name; a log can bring them back."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffhook.capture.parametrization import Parametrization
from diffhook.errors import ConfigurationError


class Weighting(ABC):
    """Timesteps (B,) → weights (B,) float32."""

    kind: str

    @abstractmethod
    def __call__(self, timesteps: Tensor, parametrization: Parametrization) -> Tensor: ...

    def describe(self) -> dict[str, Any]:
        """Kind and parameters, as JSON; :func:`make_weighting` reads it."""
        return {"kind": self.kind, **vars(self)}


class Uniform(Weighting):
    """Every timestep counts the same."""

    kind = "uniform"

    def __call__(self, timesteps: Tensor, parametrization: Parametrization) -> Tensor:
        return torch.ones(len(timesteps), device=timesteps.device)


class MinSNR(Weighting):
    """min(SNR, γ) on the error of the sample that the prediction implies (arXiv 2303.09556).

    On the prediction's own error that is min(SNR, γ) / SNR for ε-prediction, / (SNR + 1) for
    v-prediction, and times σ² for flow matching.
    """

    kind = "min_snr"

    def __init__(self, gamma: float = 5.0) -> None:
        if not gamma > 0:
            raise ConfigurationError(f"min-SNR's gamma is {gamma}; expected a positive number")
        self.gamma = gamma

    def __call__(self, timesteps: Tensor, parametrization: Parametrization) -> Tensor:
        clamped = parametrization.snr(timesteps).clamp(max=self.gamma)
        return clamped * parametrization.sample_factor(timesteps)


class SNR(Weighting):
    """SNR: with sample prediction, the loss of ε-prediction."""

    kind = "snr"

    def __call__(self, timesteps: Tensor, parametrization: Parametrization) -> Tensor:
        return parametrization.snr(timesteps)


class SigmaSqrt(Weighting):
    """σ⁻², which Stable Diffusion 3's scripts call sigma_sqrt (arXiv 2403.03206)."""

    kind = "sigma_sqrt"

    def __call__(self, timesteps: Tensor, parametrization: Parametrization) -> Tensor:
        return parametrization.sigmas(timesteps) ** -2.0


class CosMap(Weighting):
    """2 / (π (1 − 2σ + 2σ²)) (arXiv 2403.03206)."""

    kind = "cosmap"

    def __call__(self, timesteps: Tensor, parametrization: Parametrization) -> Tensor:
        sigmas = parametrization.sigmas(timesteps)
        return 2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas**2))


class Custom(Weighting):
    """A function of the user's own, timesteps (B,) → weights (B,). No log can bring it back."""

    kind = "custom"

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function

    def __call__(self, timesteps: Tensor, parametrization: Parametrization) -> Tensor:
        return self.function(timesteps)

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "name": getattr(self.function, "__qualname__", str(self.function))}


WEIGHTINGS: dict[str, type[Weighting]] = {
    kind.kind: kind for kind in (Uniform, MinSNR, SNR, SigmaSqrt, CosMap)
}


def make_weighting(given: Any) -> Weighting:
    """A weighting from the user's word: a Weighting, its name, its description, a function, or None.

    Raises:
        ConfigurationError: no such kind, or the description of a user's own function.
    """
    if given is None:
        return Uniform()
    if isinstance(given, Weighting):
        return given
    if callable(given):
        return Custom(given)
    described = {"kind": given} if isinstance(given, str) else dict(given)
    kind = described.pop("kind", None)
    if kind == Custom.kind:
        raise ConfigurationError(
            f"the loss has a weighting of the user's own ({described.get('name')}), which a log cannot bring "
            "back: pass the objective yourself"
        )
    if kind not in WEIGHTINGS:
        raise ConfigurationError(
            f"weighting is {given!r}; expected one of {', '.join(WEIGHTINGS)}, or a function of timesteps"
        )
    return WEIGHTINGS[kind](**described)
