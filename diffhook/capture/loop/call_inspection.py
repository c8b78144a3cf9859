"""What a model's forward and backward reveal: timesteps, and each sample's own loss."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from diffhook.errors import CaptureError
from diffhook.gradients import Tape

NAMES = ("timestep", "timesteps", "t")
"""What denoisers call their timestep."""


def find_timesteps(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The timesteps of a model call: by their name, or else the second positional argument.

    Returns:
        (B,) tensor: flattened from (B, 1) and the like, a single one repeated; None where there is none.

    Raises:
        CaptureError: an argument of that name has another shape, such as a timestep for each token.
    """
    found, by_name = _timestep(model, args, kwargs)
    if not isinstance(found, Tensor | int | float):
        return None
    timesteps = torch.as_tensor(found).detach()
    values = timestep_last(model, args, kwargs)
    rows = next((len(v) for v in values if isinstance(v, Tensor) and v.dim() and v is not found), 1)
    if timesteps.numel() == 1:
        return timesteps.flatten().expand(rows)
    if timesteps.dim() == 1 or timesteps.numel() == rows:
        return timesteps.flatten()
    if not by_name:
        return None
    raise CaptureError(
        f"the model's timestep has shape {tuple(timesteps.shape)}; expected a number for each of the {rows} "
        "rows, or one for all: name them with hook.step(sample_ids=..., timesteps=...)"
    )


def timestep_last(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments of a model call as its signature has them, but the timestep last, which may be one
    for all rows: so that the first tensor has the batch's length."""
    names = parameters_of(model)
    values = (*args, *(kwargs[name] for name in sorted(kwargs, key=[*names, *kwargs].index)))
    timestep, _ = _timestep(model, args, kwargs)
    return (*(value for value in values if value is not timestep), timestep)


def _timestep(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, bool]:
    """What the model is told as its timestep, and whether that is its name."""
    names = parameters_of(model)
    named = {**dict(zip(names, args, strict=False)), **kwargs}
    found = next((named[name] for name in NAMES if named.get(name) is not None), None)
    if found is None and len(args) > 1 and not any(name in names for name in NAMES):
        return args[1], False
    return found, True


def parameters_of(model: nn.Module) -> list[str]:
    """Names of what the model's forward takes; none where it does not say."""
    try:
        return list(inspect.signature(model.forward).parameters)
    except (TypeError, ValueError):
        return []


def scale_of(scaler: GradScaler | None) -> float:
    """By what a scaler multiplies losses; its optimiser step undoes it."""
    return 1.0 if scaler is None else float(scaler.get_scale())


def overflowed(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the step just taken moved nothing: a fused optimiser is stepped by a scaler even if the
    gradients are not finite, and told so."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def learning_rates(optimizer: torch.optim.Optimizer) -> list[float]:
    """Of each group, as the step uses it."""
    return [float(g["lr"]) * float(g.get("d", 1.0)) for g in optimizer.param_groups]  # d: Prodigy's estimate


class SampleLosses:
    """Per-sample losses read off the gradient of the prediction.

    For a loss that is the mean of squared errors over a sample's n elements, ∂loss/∂prediction is
    2 (prediction − target) / n, so n/4 times its squared length is the loss, without the target.

    Args:
        predicted: (B, …).
        tape: of the engine; paused while backward passes of its own run, whose gradients do not count.
    """

    def __init__(self, predicted: Tensor, tape: Tape) -> None:
        self.contradicted = False  #: the loop's loss was another than these make
        self._squares: Tensor | None = None
        self._tape = tape
        self._elements = predicted[0].numel()
        predicted.register_hook(self._collect)

    def _collect(self, gradient: Tensor) -> None:
        if self._tape.paused:
            return
        self._squares = gradient.detach().flatten(1).float().square().sum(1)

    def losses(self, undo: float, batch_loss: float | None, parts: int = 1) -> Tensor | None:
        """(B,) float32 losses; None if they do not make the batch's loss (another kind of loss).

        Args:
            undo: factor that makes a gradient that of the sample's own loss.
            batch_loss: the loss that the loop computed, before accumulation and loss scale; None: not known.
            parts: the loss is the sum of the means over so many equal parts of the batch.
        """
        if self._squares is None or batch_loss is None:
            return None
        losses = self._squares * (undo**2 * self._elements / 4)
        error = abs(float(losses.mean()) * parts - batch_loss)
        if error <= 0.01 * abs(batch_loss):
            return losses
        self.contradicted = math.isfinite(error)
        return None
