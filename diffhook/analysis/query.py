"""Gradients of images asked about later, computed at the snapshots. The one part that needs torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import safetensors.torch
import torch
from torch import nn
from torch.utils.data import default_collate

from diffhook.capture.grid import Grid, measure, to_device, undisturbed
from diffhook.capture.objective import Objective
from diffhook.console import progress_bar
from diffhook.errors import ConfigurationError, LogError
from diffhook.gradients import PerSampleGradients
from diffhook.log import RunLog, Snapshot
from diffhook.log import store as files
from diffhook.log.schema import differences, json_like, projection_dtype
from diffhook.log.writer import TableWriter


def query(
    log: RunLog,
    samples: Any,
    name: str,
    objective: Objective,
    *,
    model: nn.Module | None = None,
    grid: Grid | None = None,
    batch_size: int = 32,
    overwrite: bool = False,
    progress: bool = True,
) -> None:
    """Compute gradients of ``samples`` at every snapshot and keep them in ``log.queries[name]``.

    Args:
        log: the run; its folder must be writable.
        samples: a (Q, …) tensor of clean samples, a collated batch (dict or tuple of tensors), or a
            dataset, in the form that the objective takes; query ids are 0 … Q − 1.
        name: letters, digits, '.', '_', '-'.
        objective: the training loss.
        model: the model, with the right parameters trainable; by default one is built from the
            configuration in the log, for models of diffusers that were trained whole.
        grid: timesteps and noise draws; by default 10 × 4.
        batch_size: rows of one forward pass.
        overwrite: replace queries of that name.
        progress: show a progress bar, on a terminal.

    Raises:
        LogError: no snapshots, or queries of that name exist.
        ConfigurationError: samples or model do not fit the run.
    """
    grid = grid or Grid(10, draws=4)
    files.check_name(name)
    snapshots = log.snapshots
    if not snapshots:
        raise LogError(f"{log.location} has no snapshots to compute gradients at")
    batch, count = _collated(samples)
    model = build_model(log) if model is None else model
    engine = _engine(log, model, grid)
    if name in log.queries and not overwrite:
        raise LogError(f"{log.location} has queries {name!r} already: overwrite, or rename")
    writer: TableWriter | None = None
    device = next(model.parameters()).device
    batch = to_device(batch, device)
    with undisturbed(model), progress_bar(progress) as bar:
        task = bar.add_task(f"queries {name!r}", total=len(snapshots) * count)
        for snapshot in snapshots:
            load_snapshot(engine, snapshot)
            for rows in _measured(engine, objective, batch, count, grid, snapshot, batch_size):
                writer = writer or _writer(log, name)  # not before something fits the model
                writer.append(rows)
                bar.advance(task, len(rows["sample"]) / grid.rows)
    assert writer is not None
    writer.flush()
    description = {
        "objective": json_like(objective.describe()),
        "grid": grid.describe(),
        "snapshots": [[s.step, s.session] for s in snapshots],
    }
    writer.describe(description)


def _measured(
    engine: PerSampleGradients,
    objective: Objective,
    batch: Any,
    count: int,
    grid: Grid,
    snapshot: Snapshot,
    batch_size: int,
) -> Any:
    try:
        yield from measure(
            engine,
            objective,
            batch,
            range(count),
            grid,
            step=snapshot.step,
            lr=snapshot.lr_sum,
            weight=1.0,
            batch_size=batch_size,
        )
    except (RuntimeError, TypeError, IndexError) as error:
        shapes = json_like(_shapes(batch))
        raise ConfigurationError(
            f"the model cannot take these queries ({shapes}): {str(error).splitlines()[0]}"
        ) from error


def build_model(log: RunLog) -> nn.Module:
    """The trained model's class with random parameters, from the configuration in the log.

    Raises:
        ConfigurationError: not one of diffusers' models, or one trained in part (an adapter).
    """
    import diffusers

    identity = log.config["identity"]
    described = identity["model"]
    module, _, kind = described["class"].rpartition(".")
    found = getattr(diffusers, kind, None) if module.startswith("diffusers.") else None
    if found is None or "config" not in described:
        raise ConfigurationError(
            f"the log's model is {described['class']}, which cannot be built from the log alone: pass model="
        )
    model: nn.Module = found.from_config(described["config"])
    trained = {name for name, _ in identity["parameters"]}
    frozen = [name for name, _ in model.named_parameters() if name not in trained]
    if frozen:
        raise ConfigurationError(
            f"{len(frozen)} of the model's parameters were not trained (an adapter?), so the log "
            "does not hold them: pass model="
        )
    return model


def load_snapshot(engine: PerSampleGradients, snapshot: Snapshot) -> None:
    """Put a snapshot's parameters into the engine's model."""
    values = safetensors.torch.load(snapshot.parameters())
    with torch.no_grad():
        for name, parameter in engine.parameters.items():
            parameter.copy_(values[name])


def _engine(log: RunLog, model: nn.Module, grid: Grid) -> PerSampleGradients:
    identity = log.config["identity"]
    projection = identity["projection"]
    if projection["kind"] == "none":
        raise LogError(
            f"{log.location} was captured with projection_dim=0: it has norms only, and influence "
            "needs projections"
        )
    engine = PerSampleGradients(
        model,
        projection_dim="full" if projection["kind"] == "full" else projection["dim"],
        seed=projection["seed"],
        weight_gradients=False,
        group_size=grid.draws,
    )
    own = [[name, list(p.shape)] for name, p in engine.parameters.items()]
    differing = list(differences(identity["parameters"], own, "trainable parameters"))
    if differing:
        raise ConfigurationError(f"the model is not the one that was trained: {differing[0]}")
    return engine


def _writer(log: RunLog, name: str) -> TableWriter:
    projection = log.config["identity"]["projection"]
    store = log.writable_store()
    path = f"queries/{name}"
    files.delete(store, path)
    dtype = projection_dtype(projection["kind"])
    writer = TableWriter(store, f"{path}/rank-0000", projection["dim"], dtype)
    writer.begin_session(0)
    return writer


def _collated(samples: Any) -> tuple[Any, int]:
    """A collated batch and its size."""
    if not isinstance(samples, torch.Tensor | dict | tuple):
        samples = default_collate([samples[i] for i in range(len(samples))])
    first = samples
    while not isinstance(first, torch.Tensor):
        parts: Sequence[Any] = list(first.values()) if isinstance(first, dict) else first
        if not len(parts):
            raise ConfigurationError("there are no samples to query")
        first = parts[0]
    if first.dim() == 0 or not len(first):
        raise ConfigurationError("there are no samples to query")
    return samples, len(first)


def _shapes(batch: Any) -> Any:
    if isinstance(batch, torch.Tensor):
        return f"shape {tuple(batch.shape)}"
    if isinstance(batch, dict):
        return {key: _shapes(value) for key, value in batch.items()}
    return [_shapes(value) for value in batch]
