"""The slow twin: every per-sample quantity again, by batch-size-1 autograd in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from diffhook.gradients import Sketch

SampleLoss = Callable[[nn.Module, Any], Tensor]  # model, batch → (B,) losses


def double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: double(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(double(item) for item in value)
    return value


def rows(value: Any, index: slice) -> Any:
    """The given samples of a nested batch."""
    if isinstance(value, Tensor):
        return value[index]
    if isinstance(value, dict):
        return {key: rows(item, index) for key, item in value.items()}
    return type(value)(rows(item, index) for item in value)


def size(value: Any) -> int:
    while not isinstance(value, Tensor):
        value = next(iter(value.values())) if isinstance(value, dict) else value[0]
    return len(value)


def sample_gradients(model: nn.Module, loss: SampleLoss, batch: Any) -> Tensor:
    """(B, P) float64: the gradient of each sample's own loss over all trainable parameters."""
    twin = copy.deepcopy(model).double()
    parameters = [p for p in twin.parameters() if p.requires_grad]
    exact = double(batch)
    gradients = []
    for sample in range(size(batch)):
        losses = loss(twin, rows(exact, slice(sample, sample + 1)))
        shares = torch.autograd.grad(losses.sum(), parameters, allow_unused=True)
        flat = [
            (torch.zeros_like(p) if g is None else g).flatten()
            for p, g in zip(parameters, shares, strict=True)
        ]
        gradients.append(torch.cat(flat))
    return torch.stack(gradients)


def projected(sketch: object, model: nn.Module, gradients: Tensor) -> Tensor:
    """(B, D): the projection of (B, P) whole gradients, parameter by parameter, all of them formed."""
    assert isinstance(sketch, Sketch)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    parts = gradients.split([p.numel() for p in parameters.values()], 1)
    named = zip(parameters.items(), parts, strict=True)
    return sketch.project({name: part.view(-1, *p.shape) for (name, p), part in named})


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest over samples of ‖found − expected‖ / ‖expected‖."""
    found, expected = found.double().flatten(1), expected.double().flatten(1)
    return float(((found - expected).norm(dim=1) / expected.norm(dim=1)).max())
