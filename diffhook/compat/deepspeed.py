"""DeepSpeed's engine. Told by names: to import DeepSpeed takes seconds, and it may not be there."""

from __future__ import annotations

from typing import Any

from torch import nn

ZERO_3 = "DeepSpeed's ZeRO-3 takes the parameters away between the calls of their layers"
"""Why rows cannot be taken there; also said of a model that is seen without its engine."""


def wraps(module: nn.Module) -> bool:
    """Whether this is DeepSpeed's engine around a model, which is its ``module``."""
    kind = type(module)  # asked of all modules of a model
    return kind.__module__.startswith("deepspeed.") and kind.__name__.endswith("Engine")


def obstacle(engine: Any) -> str | None:
    """Why rows cannot be taken from what the engine trains; None: they can."""
    if type(engine).__name__ != "DeepSpeedEngine":
        return f"DeepSpeed's {type(engine).__name__} has not been seen to work with diffhook"
    stage = engine.zero_optimization_stage()
    if stage == 3:
        return ZERO_3
    if stage not in (1, 2) or not hasattr(engine.optimizer, "bit16_groups"):
        return "DeepSpeed without ZeRO-1 or ZeRO-2 has not been seen to work with diffhook"
    if engine.fp16_enabled():
        return "DeepSpeed's fp16 scales losses in a way that cannot be seen from outside, as bf16 does not"
    return None


def moved(optimizer: Any) -> set[int]:
    """ids of the parameters that an optimiser moves; ZeRO's steps flat parts of them."""
    flat = getattr(optimizer, "bit16_groups", None)
    groups = [group["params"] for group in optimizer.param_groups] if flat is None else flat
    return {id(parameter) for group in groups for parameter in group}


def steps_itself(optimizer: object) -> bool:
    """Whether the parameters have moved only when the optimiser's own ``step`` is over, and not yet with that
    of the one of torch's inside."""
    return hasattr(optimizer, "bit16_groups")
