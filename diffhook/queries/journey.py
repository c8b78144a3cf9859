"""A generated image as queries along its own path, one for each range of timesteps. Needs torch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from diffhook.capture.checkpoints.snapshots import load_snapshot
from diffhook.capture.model.borrowing import borrowed
from diffhook.capture.model.trajectory import Trajectory
from diffhook.capture.objective import Objective
from diffhook.capture.objective.diffusion import DiffusionObjective
from diffhook.capture.probes.grid import Grid, to_device
from diffhook.errors import ConfigurationError
from diffhook.gradients import PerSampleGradients
from diffhook.log import Snapshot
from diffhook.queries.question import QueryPart


def path_parts(
    path: Trajectory, objective: Objective, model: nn.Module, grid: Grid, snapshot: Snapshot
) -> list[QueryPart]:
    """At each of the grid's timesteps, the samples that the model expects at the path's nearest step.

    So noise is shared with probes, whose grid it is.

    Args:
        snapshot: whose model expects them.

    Raises:
        ConfigurationError: the path holds nothing, or the objective cannot say what is expected; or there are
            more ranges than timesteps.
    """
    path.check()
    if not isinstance(objective, DiffusionObjective):
        raise ConfigurationError(
            "a trajectory needs a DiffusionObjective, which says what the model predicts"
        )
    timesteps = sorted(grid.timesteps_of(objective))
    if len(timesteps) < path.ranges:
        raise ConfigurationError(
            f"{path.ranges} ranges of {len(timesteps)} timesteps; expected at most as many"
        )
    with borrowed(model), torch.no_grad():
        load_snapshot(PerSampleGradients(model, projection_dim=0), snapshot)
        expected = [_expected(path, objective, model, timestep) for timestep in timesteps]
    parts = []
    for number, places in enumerate(np.array_split(np.arange(len(timesteps)), path.ranges)):
        for place in places.tolist():
            ids = [image * path.ranges + number for image in range(len(expected[place]))]
            batch = {"latents": expected[place].cpu(), **path.conditions}
            own = replace(grid, timesteps=[timesteps[place]])
            parts.append(QueryPart(batch, ids, own, 1 / len(places)))
    return parts


def _expected(path: Trajectory, objective: DiffusionObjective, model: nn.Module, timestep: float) -> Tensor:
    """(B, …) the samples that the model expects at the path's step nearest to a timestep."""
    device = next(model.parameters()).device
    at, noisy = min(path.points, key=lambda point: abs(point[0] - timestep))
    noisy = noisy.to(device)
    if at == 0:
        return noisy
    told = torch.full((len(noisy),), at, device=device)
    if all(float(t).is_integer() for t in objective.schedule([0, 1])):
        told = told.round().long()
    return objective.expected(model, noisy, told, to_device(path.conditions, device))
