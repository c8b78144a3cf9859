"""What an optimiser tells of its step."""

from __future__ import annotations

import math

import torch
from torch.amp import GradScaler


def scale_of(scaler: GradScaler | None) -> float:
    """By what a scaler multiplies losses; its optimiser step undoes it."""
    return 1.0 if scaler is None else float(scaler.get_scale())


def overflowed(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the step just taken moved nothing: a fused optimiser is stepped by a scaler even if the
    gradients are not finite, and told so."""
    found = getattr(optimizer, "found_inf", None) or getattr(optimizer, "overflow", None)  # DeepSpeed's
    return found is not None and bool(found)


def learning_rates(optimizer: torch.optim.Optimizer) -> list[float]:
    """Of each group, as the step uses it; empty where the optimiser makes its own, as Adafactor does."""
    found: list[float] = []
    for group in optimizer.param_groups:
        if group.get("lr") is None:
            return []
        found.append(float(group["lr"]) * float(group.get("d", 1.0)))  # d: Prodigy's estimate
    return found if all(math.isfinite(rate) for rate in found) else []


def steps_taken(optimizer: torch.optim.Optimizer) -> int:
    """The optimiser's own count of its steps; 0 if it keeps none, as SGD."""
    counts = [state["step"] for state in optimizer.state.values() if "step" in state]
    return max((int(count) for count in counts), default=0)
