"""A call of a denoiser, whatever place its forward has for the timestep."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn


def denoise(model: nn.Module, noisy: Tensor, timesteps: Tensor, **arguments: Any) -> Any:
    """The model's output for noisy samples.

    UNets and DiT take the timestep second; most transformers call it "timestep", and conditions come first.

    Args:
        noisy: (B, …).
        timesteps: (B,), as the model is told them.
        arguments: of the model besides.
    """
    if "timestep" in list(inspect.signature(model.forward).parameters)[2:]:
        return model(noisy, timestep=timesteps, **arguments)
    return model(noisy, timesteps, **arguments)
