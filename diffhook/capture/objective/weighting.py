"""Weights on the loss, by timestep. One class a kind, registered by name; a log can bring them back."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffhook.capture.objective.parametrization import Parametrization
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


class SNRPower(Weighting):
    """SNRᵖ; with p = 1 and sample prediction ε-prediction's loss, p = −½ "debiased" (2310.08442)."""

    kind = "snr_power"

    def __init__(self, power: float = 1.0) -> None:
        self.power = power

    def __call__(self, timesteps: Tensor, parametrization: Parametrization) -> Tensor:
        return parametrization.snr(timesteps) ** self.power


class P2(Weighting):
    """(k + SNR)^−γ (arXiv 2204.00227)."""

    kind = "p2"

    def __init__(self, gamma: float = 1.0, k: float = 1.0) -> None:
        self.gamma, self.k = gamma, k

    def __call__(self, timesteps: Tensor, parametrization: Parametrization) -> Tensor:
        return (self.k + parametrization.snr(timesteps)) ** -self.gamma


class SigmaPower(Weighting):
    """σᵖ: with p = −2 what Stable Diffusion 3's scripts call sigma_sqrt (arXiv 2403.03206), with p = 2 what
    they do to the flow's error where they precondition outputs."""

    kind = "sigma_power"

    def __init__(self, power: float = -2.0) -> None:
        self.power = power

    def __call__(self, timesteps: Tensor, parametrization: Parametrization) -> Tensor:
        return parametrization.sigmas(timesteps) ** self.power


class CosMap(Weighting):
    """2 σᵖ / (π (1 − 2σ + 2σ²)); p = 0 (arXiv 2403.03206), but 2 where outputs are preconditioned."""

    kind = "cosmap"

    def __init__(self, power: float = 0.0) -> None:
        self.power = power

    def __call__(self, timesteps: Tensor, parametrization: Parametrization) -> Tensor:
        sigmas = parametrization.sigmas(timesteps)
        return 2 * sigmas**self.power / (math.pi * (1 - 2 * sigmas + 2 * sigmas**2))


class Custom(Weighting):
    """A function of the user's own, timesteps (B,) → weights (B,). No log can bring it back."""

    kind = "custom"

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function

    def __call__(self, timesteps: Tensor, parametrization: Parametrization) -> Tensor:
        return self.function(timesteps)

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "name": getattr(self.function, "__qualname__", str(self.function))}


NAMED = {
    "snr": {"kind": SNRPower.kind, "power": 1.0},
    "debiased": {"kind": SNRPower.kind, "power": -0.5},
    "preconditioned": {"kind": SigmaPower.kind, "power": 2.0},
    "sigma_sqrt": {"kind": SigmaPower.kind, "power": -2.0},
}
"""Names that papers and scripts have for some of them."""

WEIGHTINGS: dict[str, type[Weighting]] = {
    kind.kind: kind for kind in (Uniform, MinSNR, SNRPower, P2, SigmaPower, CosMap)
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
    described: dict[str, Any] = NAMED.get(given, {"kind": given}) if isinstance(given, str) else given
    described = dict(described)
    kind = described.pop("kind", None)
    if kind == Custom.kind:
        raise ConfigurationError(
            f"the loss has a weighting of the user's own ({described.get('name')}), which a log cannot bring "
            "back: pass the objective yourself"
        )
    if kind not in WEIGHTINGS:
        known = ", ".join([*WEIGHTINGS, *NAMED])
        raise ConfigurationError(
            f"weighting is {given!r}; expected one of {known}, or a function of timesteps"
        )
    return WEIGHTINGS[kind](**described)
