"""Accelerate's. What was prepared before us it lists nowhere in public."""

from __future__ import annotations

from typing import Any, NamedTuple


class PreparedParts(NamedTuple):
    """By an Accelerator: models and loaders as it wraps them, and AcceleratedOptimizers."""

    models: list[Any]
    optimizers: list[Any]
    loaders: list[Any]


def prepared(accelerator: Any) -> PreparedParts:
    return PreparedParts(accelerator._models, accelerator._optimizers, accelerator._dataloaders)
