"""Samples that the trained model makes, to be asked about. Needs torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffhook.analysis.defaults import as_log
from diffhook.capture.checkpoints.snapshots import load_snapshot
from diffhook.capture.model.borrowing import borrowed
from diffhook.capture.model.families import sides
from diffhook.capture.model.pipeline import SavedPipeline
from diffhook.capture.model.refusal import refused
from diffhook.capture.model.sampling import sample
from diffhook.capture.objective.diffusion import DiffusionObjective
from diffhook.errors import ConfigurationError, LogError
from diffhook.gradients import PerSampleGradients
from diffhook.log import RunLog, Snapshot
from diffhook.log.store import Location
from diffhook.queries.rebuilt import build_model, build_objective, check_pipeline


@dataclass(frozen=True)
class Generated:
    """Samples of the model at a snapshot.

    Attributes:
        batch: for :func:`diffhook.query`: latents where the model works on latents.
        images: (N, C, H, W) in [−1, 1], to look at, on the CPU.
        details: seeds, denoising steps and snapshot, as JSON, for :func:`diffhook.query`.
    """

    batch: Mapping[str, Any]
    images: Tensor
    details: Mapping[str, Any]


def generate(
    log: RunLog | Location,
    count: int,
    *,
    seed: int = 0,
    steps: int = 50,
    captions: Sequence[str] | None = None,
    class_labels: Sequence[int] | None = None,
    objective: DiffusionObjective | None = None,
    model: nn.Module | None = None,
    pipeline: SavedPipeline | None = None,
    step: int | None = None,
    batch_size: int = 8,
) -> Generated:
    """Sample from the model as a snapshot has it; sample n has the random seed ``seed + n``.

    Args:
        log: the run, or where it lies.
        count: N.
        seed: of the first sample.
        steps: denoising steps.
        captions: N texts, for a pipeline that takes them; it then samples with its own scheduler
            and default guidance.
        class_labels: N classes, for a model that is told them.
        objective, model, pipeline: as :func:`diffhook.query` takes them.
        step: the snapshot's; by default the last.
        batch_size: samples at once.

    Raises:
        LogError: no such snapshot.
        ConfigurationError: captions, class labels or model do not fit.
    """
    if min(count, steps, batch_size) < 1:
        raise ConfigurationError(
            f"{count} samples in {steps} denoising steps, {batch_size} at once; expected at least 1 of each"
        )
    log = as_log(log)
    snapshot = _find_snapshot(log, step)
    check_pipeline(log, pipeline)
    objective = build_objective(log, pipeline) if objective is None else objective
    model = build_model(log, pipeline) if model is None else model
    seeds = list(range(seed, seed + count))
    conditions = {} if pipeline is None else pipeline.conditions(count, captions)
    told = _told(model, class_labels, count, captions)
    shape = _shape(model)
    parts = []
    with borrowed(model), refused("the model cannot make samples"):
        load_snapshot(PerSampleGradients(model, projection_dim=0), snapshot)
        for start in range(0, count, batch_size):
            some = seeds[start : start + batch_size]
            own = {name: values[start : start + batch_size] for name, values in told.items()}
            if captions is not None and pipeline is not None:
                parts.append(pipeline.generate(captions[start : start + batch_size], some, steps))
            else:
                parts.append(sample(model, objective, shape, some, steps, own))
    samples = torch.cat(parts)
    images = samples if pipeline is None else pipeline.decode(samples)
    details: dict[str, Any] = {"seeds": seeds, "denoising_steps": steps}
    details["snapshot"] = [snapshot.step, snapshot.session]
    if captions is not None:
        details["captions"] = list(captions)
    if class_labels is not None:
        details["class_labels"] = list(class_labels)
    return Generated({"latents": samples, **conditions, **told}, images.clamp(-1, 1).cpu(), details)


def _find_snapshot(log: RunLog, step: int | None) -> Snapshot:
    snapshots = log.snapshots
    found = [s for s in snapshots if step is None or s.step == step]
    if not found:
        known = ", ".join(str(s.step) for s in snapshots) or "none"
        raise LogError(f"{log.location} has no snapshot of step {step}; it has {known}")
    return found[-1]


def _told(
    model: nn.Module, class_labels: Sequence[int] | None, count: int, captions: Sequence[str] | None
) -> dict[str, Tensor]:
    """The model's arguments beside samples and timesteps."""
    if class_labels is None:
        return {}
    if captions is not None:
        raise ConfigurationError("a pipeline samples by captions, not by class_labels: give one of both")
    if len(class_labels) != count:
        raise ConfigurationError(f"there are {len(class_labels)} class labels for {count} samples")
    return {"class_labels": torch.tensor(class_labels, device=next(model.parameters()).device)}


def _shape(model: nn.Module) -> tuple[int, int, int]:
    """Of one sample, from a diffusers model's configuration."""
    config: Any = getattr(model, "config", {})
    channels, size = config.get("in_channels"), config.get("sample_size")
    if not isinstance(channels, int) or size is None:
        raise ConfigurationError(
            f"{type(model).__name__} does not say what it samples: expected in_channels and sample_size in "
            "its config"
        )
    return channels, *sides(size)
