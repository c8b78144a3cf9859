"""A call of a denoiser, whatever place its forward has for the timestep."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

TIMESTEP_NAMES = ("timestep", "timesteps", "t", "time", "sigma", "sigmas", "noise_labels", "noise_level")
"""What denoisers call their timestep."""


def denoise(model: nn.Module, noisy: Tensor, timesteps: Tensor, **arguments: Any) -> Any:
    """The model's output for noisy samples.

    UNets and DiT take the timestep second; most transformers take it by name, and conditions come first.

    Args:
        noisy: (B, …).
        timesteps: (B,), as the model is told them.
        arguments: of the model besides.
    """
    names = list(inspect.signature(model.forward).parameters)
    name = timestep_name(names)
    if name in names[2:]:
        return model(noisy, **{name: timesteps}, **arguments)
    return model(noisy, timesteps, **arguments)


def timestep_name(names: list[str]) -> str | None:
    """The one of a forward's parameters that is its timestep; None: none is called so."""
    return next((name for name in TIMESTEP_NAMES if name in names[1:]), None)
