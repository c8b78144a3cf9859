"""What a model's forward and backward reveal: timesteps, and each sample's own loss."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

_NAMES = ("timestep", "timesteps", "t")


def find_timesteps(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The timesteps of a model call: by their name, or else the second positional argument.

    Returns:
        (B,) tensor, a scalar one repeated; None where there is none.
    """
    found = next((kwargs[name] for name in _NAMES if kwargs.get(name) is not None), None)
    if found is None and len(args) > 1:
        found = args[_position(model)] if _position(model) < len(args) else None
    if not isinstance(found, Tensor | int | float):
        return None
    timesteps = torch.as_tensor(found).detach()
    if timesteps.numel() == 1:
        batch = next((a.shape[0] for a in (*args, *kwargs.values()) if _batched(a)), 1)
        timesteps = timesteps.flatten().expand(batch)
    return timesteps if timesteps.dim() == 1 else None


def _position(model: nn.Module) -> int:
    """Of the timestep among the positional arguments of a model's forward."""
    names = list(inspect.signature(model.forward).parameters)
    return next((names.index(name) for name in _NAMES if name in names), 1)


def scale_of(scaler: GradScaler | None) -> float:
    """By what a scaler multiplies losses; its optimiser step undoes it."""
    return 1.0 if scaler is None else float(scaler.get_scale())


def overflowed(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the step just taken moved nothing: a fused optimiser is stepped by a scaler even if the
    gradients are not finite, and told so."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def _batched(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


class SampleLosses:
    """Per-sample losses read off the gradient of the prediction.

    For a loss that is the mean of squared errors over a sample's n elements, ∂loss/∂prediction is
    2 (prediction − target) / n, so n/4 times its squared length is the loss, without the target.
    """

    def __init__(self, predicted: Tensor) -> None:
        self._squares: Tensor | None = None
        self._elements = predicted[0].numel()
        predicted.register_hook(self._collect)

    def _collect(self, gradient: Tensor) -> None:
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
        return losses if error <= 0.01 * abs(batch_loss) else None
