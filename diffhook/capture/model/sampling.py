"""Sampling from a model, each sample from a seed of its own."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from diffhook.capture.objective.diffusion import DiffusionObjective
from diffhook.capture.objective.schedulers import remade


@torch.no_grad()
def sample(
    model: nn.Module,
    objective: DiffusionObjective,
    shape: Sequence[int],
    seeds: Sequence[int],
    steps: int,
    conditions: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Samples without guidance by the objective's own scheduler. A seed gives the same in any company.

    Args:
        model: the denoiser.
        objective: whose scheduler and prediction type to sample with.
        shape: of one sample.
        seeds: one a sample.
        steps: denoising steps.
        conditions: the model's arguments besides, such as class labels, each with a value a sample.

    Returns:
        (len(seeds), \\*shape), on the model's device.
    """
    parameter = next(model.parameters())
    trained = objective.scheduler
    kind = {"prediction_type": objective.prediction_type} if "prediction_type" in trained.config else {}
    scheduler = remade(trained, **kind)
    scheduler.set_timesteps(steps)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = torch.stack([torch.randn(tuple(shape), generator=g) for g in generators])
    state = noise.to(parameter.device, parameter.dtype) * getattr(scheduler, "init_noise_sigma", 1.0)
    draws = "generator" in inspect.signature(scheduler.step).parameters
    options = {"generator": generators} if draws else {}
    scales = hasattr(scheduler, "scale_model_input")
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(state, timestep) if scales else state
        timesteps = timestep.to(state.device).expand(len(seeds))
        output = objective.output(model, scaled, timesteps, dict(conditions or {}))
        state = scheduler.step(output, timestep, state, **options).prev_sample
    return state
