"""Accelerate's. What was prepared before us it lists nowhere in public."""

from __future__ import annotations

from typing import Any, NamedTuple


class Prepared(NamedTuple):
    """By an Accelerator: models and loaders as it wraps them, and AcceleratedOptimizers."""

    models: list[Any]
    optimizers: list[Any]
    loaders: list[Any]


def prepared(accelerator: Any) -> Prepared:
    return Prepared(accelerator._models, accelerator._optimizers, accelerator._dataloaders)
