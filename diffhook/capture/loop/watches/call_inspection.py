"""What the arguments of a model's call tell: its timesteps, and the order in which it takes them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffhook.capture.loop.identity.batch_ids import describe
from diffhook.capture.objective.denoising import TIMESTEP_NAMES
from diffhook.errors import CaptureError, ConfigurationError


class ToldTimesteps(NamedTuple):
    """(B,) timesteps of a call, and whether the argument has one of :data:`TIMESTEP_NAMES`."""

    values: Tensor
    by_name: bool


def find_timesteps(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> ToldTimesteps | None:
    """The timesteps of a model's call: by their name, or else the second positional argument.

    Returns:
        (B,): flattened from (B, 1) and the like, a single one repeated; None where there is none.

    Raises:
        CaptureError: an argument of that name has another shape, such as a timestep for each token.
    """
    found, by_name = _timestep(model, args, kwargs)
    if not isinstance(found, Tensor | int | float) or isinstance(found, bool):
        return None
    timesteps = torch.as_tensor(found).detach()
    values = timestep_last(model, args, kwargs)
    rows = next((len(v) for v in values if isinstance(v, Tensor) and v.dim() and v is not found), 1)
    if timesteps.numel() == 1:
        return ToldTimesteps(timesteps.flatten().expand(rows), by_name)
    if timesteps.dim() == 1 or timesteps.numel() == rows:
        return ToldTimesteps(timesteps.flatten(), by_name)
    if not by_name:
        return None
    raise CaptureError(
        f"the model's timestep has shape {tuple(timesteps.shape)}; expected a number for each of the {rows} "
        "rows, or one for all: name them with hook.step(sample_ids=..., timesteps=...)"
    )


def named_timesteps(values: Any) -> Tensor:
    """(B,) timesteps that the loop names itself, as they are now.

    Raises:
        ConfigurationError: they are no numbers, or not finite.
    """
    try:
        timesteps = torch.as_tensor(values).detach().flatten().clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigurationError(
            f"timesteps is {describe(values)}; expected one number for each sample, or a tensor of them"
        ) from error
    if timesteps.is_floating_point() and not bool(timesteps.isfinite().all()):
        raise ConfigurationError(f"timesteps has values that are not finite: {timesteps.tolist()}")
    return timesteps


def takes_timesteps(module: nn.Module) -> bool:
    """Whether a parameter of the module's forward has one of :data:`TIMESTEP_NAMES`."""
    return not set(TIMESTEP_NAMES).isdisjoint(parameters_of(module))


def timestep_last(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """The arguments of a model call as its signature has them, but the timestep last, which may be one
    for all rows: so that the first tensor has the batch's length."""
    names = parameters_of(model)
    values = (*args, *(kwargs[name] for name in sorted(kwargs, key=[*names, *kwargs].index)))
    timestep, _ = _timestep(model, args, kwargs)
    return (*(value for value in values if value is not timestep), timestep)


def _timestep(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, bool]:
    """What the model is told as its timestep, and whether that is its name."""
    names = parameters_of(model)
    named = {**dict(zip(names, args, strict=False)), **kwargs}
    found = next((named[name] for name in TIMESTEP_NAMES if named.get(name) is not None), None)
    if found is None and len(args) > 1 and not any(name in names for name in TIMESTEP_NAMES):
        return args[1], False
    return found, True


def parameters_of(model: nn.Module) -> list[str]:
    """Names of what the model's forward takes; none where it does not say."""
    try:
        return list(inspect.signature(model.forward).parameters)
    except (TypeError, ValueError):
        return []
