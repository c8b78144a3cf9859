"""Gradients of images asked about later, computed at the snapshots."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.data import default_collate

from diffhook.analysis.defaults import as_log
from diffhook.analysis.directions import tell_broken
from diffhook.analysis.pairing import SOURCES, probe_grid
from diffhook.analysis.tables import check_query_name
from diffhook.capture.model.borrowing import borrowed
from diffhook.capture.model.pipeline import SavedPipeline
from diffhook.capture.model.trajectory import Trajectory
from diffhook.capture.objective import Objective
from diffhook.capture.probes.grid import Grid, take
from diffhook.capture.samples.appearance import images_of
from diffhook.console import progress_bar
from diffhook.errors import ConfigurationError, LogError
from diffhook.gradients import PerSampleGradients, Sketch
from diffhook.log import RunLog, Snapshot, Table
from diffhook.log import store as files
from diffhook.log.lock import query_lock
from diffhook.log.schema import differences, json_like, projection_dtype
from diffhook.log.store import Location
from diffhook.log.table_writer import TableWriter, empty_group
from diffhook.queries.journey import path_parts
from diffhook.queries.question import QueryPart, Question
from diffhook.queries.rebuilt import (
    build_model,
    build_objective,
    check_pipeline,
)
from diffhook.queries.scale import tell_other_scale

logger = logging.getLogger("diffhook")

_EXPECTED = (
    "expected a (Q, …) tensor, a collated batch, or a dataset of tensors, as the model is trained on them "
    "(`diffhook query --images` reads files)"
)


def query(
    log: RunLog | Location,
    samples: Any,
    name: str,
    objective: Objective | None = None,
    *,
    ids: Sequence[int] | None = None,
    model: nn.Module | None = None,
    pipeline: SavedPipeline | None = None,
    grid: Grid | None = None,
    against: str | Sequence[str] | None = None,
    preconditioned: bool | Literal["root"] = False,
    batch_size: int = 32,
    overwrite: bool = False,
    progress: bool = True,
    details: Mapping[str, Any] | None = None,
) -> Table:
    """Compute gradients of ``samples`` at every snapshot and keep them in ``log.queries[name]``.

    What is there already from the same samples, grid, objective, model and snapshots is not
    computed again (unless the objective has functions of the user's own, which cannot be compared).

    Args:
        log: the run, or where it lies; its folder must be writable.
        samples: a (Q, …) tensor of clean samples, a collated batch (mapping or tuple of tensors), or a
            dataset, in the form that the objective takes; or a :class:`~diffhook.Trajectory`.
        name: letters, digits, '.', '_', '-'.
        objective: the training loss; by default the one that the log records, or else that of the
            pipeline's scheduler.
        ids: which of the samples to ask about, by position; they become the query ids, which are
            otherwise 0 … Q − 1. With a training dataset: its sample ids.
        model: the model, with the right parameters trainable; by default :func:`build_model`'s. It is
            as before afterwards.
        pipeline: whose denoiser was trained, where the log does not hold all of its parameters.
        grid: timesteps and noise draws; by default that of the log's probes, or else 20 timesteps × 2
            draws × 2 replicates, from which scores have errors: events drew timesteps of their own, and
            there is none near enough to them on a sparser grid.
        against: which rows the queries are to be set against. Probes, and other query sets as the source,
            share the grid's noise with them draw by draw ("probe"); the training's own rows each drew
            their own, and so must queries ("train"). By default all that the log holds; each kind costs a
            pass of its own.
        preconditioned: divide gradients by Adam's √v̂ + ε, at the snapshots that keep it: of a run with
            ``keep_preconditioner=True``. True: for the methods "adam-tracin" and "adam-retrac", against
            plain rows. "root": by its root, for queries and for training samples as their source alike, which
            keeps more of the products' order in a projection, and which every method can score.
        batch_size: rows of one forward pass.
        overwrite: replace other queries of that name.
        progress: show a progress bar, on a terminal.
        details: what to record of the samples beside the rows, as JSON.

    Returns:
        The rows.

    Raises:
        LogError: no snapshots, none with a preconditioner where one is asked for, or other queries of
            that name exist.
        ConfigurationError: samples, model or pipeline do not fit the run; or batch_size is under 1.
    """
    if batch_size < 1:
        raise ConfigurationError(f"batch_size is {batch_size}; expected at least 1")
    if preconditioned not in (False, True, "root"):
        raise ConfigurationError(f'preconditioned is {preconditioned!r}; expected False, True or "root"')
    check_query_name(name)
    files.check_name(name)
    log = as_log(log)
    question = _question(log, samples, objective, ids, model, pipeline, grid, against, preconditioned)
    engine = _engine(log, question.model, question.grid)
    tell_other_scale(log, question.parts[0].batch)
    description = question.describe(details or {})
    if (known := _answered(log, name, description["digest"], overwrite)) is not None:
        return known
    store = log.writable_store()
    with files.refusals(store), query_lock(store, name):
        # Computed since the log was opened, perhaps, by another process.
        if (known := _answered(log.refresh(), name, description["digest"], overwrite)) is not None:
            return known
        _answer(log, name, question, engine, description, batch_size, progress)
    table = log.refresh().queries.get(name)
    if table is None:
        raise LogError(
            f"queries {name!r} were computed at snapshots that a resumed run has superseded meanwhile: "
            "compute them again, at those that count now"
        )
    tell_broken(table, name)
    return table


def _question(
    log: RunLog,
    samples: Any,
    objective: Objective | None,
    ids: Sequence[int] | None,
    model: nn.Module | None,
    pipeline: SavedPipeline | None,
    grid: Grid | None,
    against: str | Sequence[str] | None,
    preconditioned: bool | str,
) -> Question:
    """Arguments as of :func:`query`; what is not given, from the log."""
    snapshots = _snapshots(log, preconditioned)
    check_pipeline(log, pipeline)
    grid = grid or default_grid(log)
    parts = [] if isinstance(samples, Trajectory) else [_part(samples, ids, grid)]  # before a model is built
    objective = build_objective(log, pipeline) if objective is None else objective
    model = build_model(log, pipeline) if model is None else model
    kinds = _kinds(log, against, json_like(objective.describe()).get("measurement", "loss"))
    if isinstance(samples, Trajectory):
        parts = path_parts(samples, objective, model, grid, snapshots[-1])
    return Question(parts, objective, model, grid, kinds, snapshots, preconditioned)


def _part(samples: Any, ids: Sequence[int] | None, grid: Grid) -> QueryPart:
    batch, query_ids = _collated(samples, ids)
    _check_dtype(batch)
    return QueryPart(batch, query_ids, grid)


def _answered(log: RunLog, name: str, digest: str | None, overwrite: bool) -> Table | None:
    """The queries of that name, where they are the same; None where they are to be computed."""
    if name not in log.queries:
        return None
    digests = log.queries[name].description.get("digest"), digest
    if None not in digests and digests[0] == digests[1]:
        logger.info("queries %r are there already", name)
        return log.queries[name]
    if not overwrite:
        raise LogError(f"{log.location} has queries {name!r} already, {_difference(digests)}")
    return None


def _answer(
    log: RunLog,
    name: str,
    question: Question,
    engine: PerSampleGradients,
    description: Mapping[str, Any],
    batch_size: int,
    progress: bool,
) -> None:
    """Compute the rows and write them."""
    writer: TableWriter | None = None
    with borrowed(question.model), progress_bar(progress) as bar:
        task = bar.add_task(f"queries {name!r}", total=question.rows)
        for rows in question.measured(engine, batch_size):
            writer = writer or _writer(log, name)  # not before something fits the model
            writer.append(rows)
            bar.advance(task, len(rows["sample"]))
        assert writer is not None
        writer.flush()
        writer.describe(description)


def default_grid(log: RunLog) -> Grid:
    """That of the log's probes, so that queries share their noise; 20 × 2 × 2 where there are none."""
    described = probe_grid(log)
    return Grid(20, draws=2, replicates=2) if described is None else Grid(**described)


def _kinds(log: RunLog, against: str | Sequence[str] | None, measurement: str) -> list[str]:
    """Of "train" and "probe", those that are asked for, or by default those that the log can serve."""
    if against is not None:
        kinds = [against] if isinstance(against, str) else list(against)
        unknown = [kind for kind in kinds if kind not in SOURCES]
        if unknown or not kinds:
            raise ConfigurationError(f"against is {against!r}; expected 'train', 'probe', or both")
        return [kind for kind in SOURCES if kind in kinds]
    if measurement != "loss":  # the training's own rows hold gradients of the loss
        return ["probe"]
    if probe_grid(log) is None:
        return ["train"]
    return list(SOURCES) if len(log.train) else ["probe"]


def _difference(digests: tuple[str | None, str | None]) -> str:
    """What is known of it, and what to do."""
    if None in digests:
        return (
            "and whether to the same question cannot be told: an objective of your own, or with functions of "
            "your own, cannot be compared. Use those that are there by their name, overwrite, or rename"
        )
    return "from other samples, grid, objective or model, or against other rows: overwrite, or rename"


def _snapshots(log: RunLog, preconditioned: bool | str) -> list[Snapshot]:
    snapshots = log.snapshots
    if not snapshots:
        raise LogError(f"{log.location} has no snapshots to compute gradients at")
    if not preconditioned:
        return snapshots
    able = [s for s in snapshots if s.preconditioner_digest is not None]
    if not able:
        raise LogError(
            f"no snapshot of {log.location} keeps a preconditioner: train with "
            "DiffHook(..., keep_preconditioner=True) and Adam, AdamW or NAdam of torch.optim"
        )
    if len(able) < len(snapshots):
        without = ", ".join(str(s.step) for s in snapshots if s not in able)
        logger.warning("the snapshots of steps %s keep no preconditioner and are left out", without)
    return able


def _engine(log: RunLog, model: nn.Module, grid: Grid) -> PerSampleGradients:
    identity = log.config["identity"]
    projection = identity["projection"]
    if projection["kind"] == "none":
        raise LogError(
            f"{log.location} was captured with projection_dim=0: it has norms only, and influence "
            "needs projections"
        )
    if projection["kind"] == "sketch" and projection.get("version") != Sketch.VERSION:
        raise LogError(
            f"{log.location} has projections of version {projection.get('version')}, and this diffhook makes "
            f"version {Sketch.VERSION}, which cannot be compared: query it with the diffhook that captured it"
        )
    engine = PerSampleGradients(
        model,
        layers=identity.get("layers"),
        projection_dim="full" if projection["kind"] == "full" else projection["dim"],
        seed=projection["seed"],
        weight_gradients=False,
        group_size=grid.draws,
    )
    own = [[name, list(shape)] for name, shape in engine.shapes.items()]
    differing = list(differences(identity["parameters"], own, "trainable parameters"))
    if differing:
        raise ConfigurationError(f"the model is not the one that was trained: {differing[0]}")
    return engine


def _writer(log: RunLog, name: str) -> TableWriter:
    projection = log.config["identity"]["projection"]
    store = log.writable_store()
    path = f"queries/{name}/rank-0000"
    empty_group(store, path)
    return TableWriter(store, path, projection["dim"], projection_dtype(projection["kind"]))


def _collated(samples: Any, ids: Sequence[int] | None) -> tuple[Any, list[int]]:
    """A collated batch and the ids of its samples."""
    batched = isinstance(samples, torch.Tensor | Mapping | tuple)
    try:
        count = _count(samples) if batched else len(samples)
    except TypeError as error:
        raise ConfigurationError(f"the samples are of type {type(samples).__name__}: {_EXPECTED}") from error
    chosen = list(range(count)) if ids is None else [int(i) for i in ids]
    outside = [i for i in chosen if not 0 <= i < count]
    if outside:
        raise ConfigurationError(f"query ids {outside[:5]} are not among the {count} samples")
    if len(set(chosen)) < len(chosen):
        twice = next(i for i in chosen if chosen.count(i) > 1)
        raise ConfigurationError(f"query id {twice} is named more than once; expected each once")
    if not chosen:
        raise ConfigurationError("there are no samples to query")
    if not batched:
        items = [samples[i] for i in chosen]
        try:
            return default_collate(items), chosen
        except TypeError as error:
            raise ConfigurationError(f"samples of type {type(items[0]).__name__}: {_EXPECTED}") from error
    return samples if ids is None else take(samples, torch.tensor(chosen)), chosen


def _check_dtype(batch: Any) -> None:
    """Clean samples are on the model's scale: integers are pixels that nobody has normalised.

    Raises:
        ConfigurationError: they are integers.
    """
    images = images_of(batch)
    if images is not None and not images.is_floating_point():
        kind = str(images.dtype).removeprefix("torch.")
        raise ConfigurationError(
            f"samples are {kind}, from {images.min()} to {images.max()}; expected floats as the model was "
            "trained on, such as images / 127.5 - 1"
        )


def _count(batch: Any) -> int:
    """Samples in a collated batch, as its first part tells."""
    if isinstance(batch, torch.Tensor):
        return len(batch) if batch.dim() else 0
    parts = list(batch.values()) if isinstance(batch, Mapping) else batch
    nested = [part for part in parts if isinstance(part, torch.Tensor | Mapping | tuple | list)]
    if nested:
        return _count(nested[0])
    return 0 if isinstance(batch, Mapping) else len(parts)  # texts, say
