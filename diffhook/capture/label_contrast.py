"""Wrong labels: which samples a class-conditional model denoises better under another class than their own.

Forward passes only. A model that has learned the classes finds a wrongly labelled sample easier under its
true class; nothing else in a log shows that so plainly.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from diffhook.capture.diffusion import DiffusionObjective
from diffhook.capture.grid import Grid
from diffhook.capture.objective import Objective

CLASSES = 16
"""Of more classes, so many, evenly spaced, are tried beside a sample's own."""

Batches = Callable[[], Iterable[tuple[Sequence[int], Any]]]  # () → (sample ids, collated batch on the device)


def label_contrasts(model: nn.Module, objective: Objective, batches: Batches, grid: Grid) -> dict[int, float]:
    """Sample id → log loss under its own class − log of the smallest under another; {} without classes.

    Positive: another class fits better. A loss is the sum over the grid's timesteps, each divided by the
    mean over samples there, so that no timestep rules; the noise at a timestep is the same for all.

    Args:
        objective: one whose inputs hand the model integer ``class_labels``; of others, nothing is known.
        batches: goes through the samples, from the beginning at each call.
        grid: timesteps; one draw of noise at each.
    """
    if not isinstance(objective, DiffusionObjective):
        return {}
    known = _known_labels(objective, batches)
    classes = np.unique(list(known.values()))
    if len(classes) < 2:
        return {}
    tried = classes[np.unique(np.linspace(0, len(classes) - 1, CLASSES).round().astype(int))]
    samples, own, others = _losses(model, objective, batches, grid, tried)
    others[:, np.array([known[i] for i in samples])[:, None] == tried] = np.inf
    scale = own.mean(1, keepdims=True)
    smallest = (others / scale[:, :, None]).sum(0).min(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        contrasts = np.log((own / scale).sum(0)) - np.log(smallest)
    return dict(zip(samples, contrasts.tolist(), strict=True))


def _known_labels(objective: DiffusionObjective, batches: Batches) -> dict[int, int]:
    """Sample id → its class; {} where the model is told none."""
    found: dict[int, int] = {}
    for ids, batch in batches():
        own = _labels(objective, batch)
        if own is None:
            return {}
        found.update(zip(ids, own.tolist(), strict=True))
    return found


def _losses(
    model: nn.Module, objective: DiffusionObjective, batches: Batches, grid: Grid, tried: npt.NDArray[Any]
) -> tuple[list[int], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Sample ids, (S, N) losses under the samples' own classes, and (S, N, C) under those tried."""
    timesteps = grid.timesteps_of(objective)
    under = [objective, *(_under(objective, int(label)) for label in tried)]
    samples: list[int] = []
    found = []
    with torch.no_grad():
        for ids, batch in batches():
            each = []
            for timestep in timesteps:
                times = torch.full((len(ids),), timestep, device=next(model.parameters()).device)
                seeds = torch.full((len(ids),), grid.seeds(timestep, 0)[0])
                each.append(torch.stack([one(model, batch, times, seeds).double() for one in under], 1))
            samples += ids
            found.append(torch.stack(each).cpu().numpy())
    losses = np.concatenate(found, axis=1)
    return samples, losses[:, :, 0], losses[:, :, 1:]


def _labels(objective: DiffusionObjective, batch: Any) -> Tensor | None:
    """(B,) the integer class labels that the model is told, if it is."""
    found = objective.inputs(batch)[1].get("class_labels")
    plain = isinstance(found, Tensor) and found.dim() == 1 and not found.is_floating_point()
    return found if plain else None


def _under(objective: DiffusionObjective, label: int) -> DiffusionObjective:
    """The objective with every sample told to be of one class."""
    changed = copy.copy(objective)

    def inputs(batch: Any) -> tuple[Tensor, dict[str, Any]]:
        clean, arguments = objective.inputs(batch)
        return clean, {**arguments, "class_labels": torch.full_like(arguments["class_labels"], label)}

    changed.inputs = inputs
    return changed
