"""Probes at the checkpoints of a training that is over. Any number of processes may share the work.

A process takes a rank of the log for itself and goes through the checkpoints, and through the parts of each,
every sixteenth sample. A part is locked while it is measured. What a killed process has left undone, down to
single rows, is what the log does not hold.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from zarr.abc.store import Store

from diffhook.capture.checkpoints.finding import Checkpoint, Paths, find_checkpoints
from diffhook.capture.checkpoints.held import HeldRows
from diffhook.capture.checkpoints.plan import PlannedSnapshots, check_log, plan
from diffhook.capture.checkpoints.same_data import check_appearance, check_names
from diffhook.capture.checkpoints.snapshots import load_snapshot
from diffhook.capture.checks import check_location, check_whole
from diffhook.capture.loop.run.describe import describe_run
from diffhook.capture.model.borrowing import borrowed
from diffhook.capture.model.pipeline import SavedPipeline
from diffhook.capture.model.refusal import refused
from diffhook.capture.objective import Objective, check_objective
from diffhook.capture.probes.probe import Probe
from diffhook.capture.projection_dim import known_dim, usual_dim
from diffhook.console import announce, progress_bar
from diffhook.errors import ConfigurationError, LogBusyError, LogError
from diffhook.gradients import PerSampleGradients
from diffhook.log import LogWriter, RunLog, Snapshot, open_log
from diffhook.log import store as files
from diffhook.log.lock import part_lock, rank_lock
from diffhook.log.reference import MovedCheckpointError
from diffhook.log.root import find_config
from diffhook.log.store import Location
from diffhook.words import plural

logger = logging.getLogger("diffhook")

_PARTS = 16  # of each checkpoint, by sample id
_FLUSH = 5.0  # seconds of work that a kill may cost
_WAIT = 0.5  # seconds between looks at what other processes are doing
_MOST_PROCESSES = 1000


def from_checkpoints(
    model: nn.Module,
    checkpoints: Paths | Sequence[Checkpoint],
    dataset: Any,
    objective: Objective,
    path: Location,
    *,
    probe: Probe | None = None,
    names: Mapping[int, str] | None = None,
    learning_rates: Sequence[float] | None = None,
    train_batch_size: int = 1,
    ema: bool = False,
    layers: str | Sequence[str] | None = None,
    projection_dim: int | None = None,
    seed: int = 0,
    pipeline: SavedPipeline | None = None,
    progress: bool = True,
) -> RunLog:
    """Measure training samples at the checkpoints that a training has left.

    The log is that of a watched run without rows of training steps: ``influence``, ``query``, ``outliers``
    and the page take it. Weights are not copied: snapshots say where the checkpoints lie, and their
    checksums. Called again, after a kill or with further checkpoints or samples, it measures what is missing.
    Processes that are started with the same arguments share the work, where the log is in a folder.

    Args:
        model: the one that was trained, with the right parameters trainable. It is as before afterwards.
        checkpoints: a pattern such as "out/checkpoint-*", paths, a mapping from step to path, or what
            :func:`~diffhook.capture.checkpoints.find_checkpoints` gives.
        dataset: of the training, in its order: sample ids are its indices.
        objective: the training loss, such as ``DiffusionObjective(noise_scheduler)``.
        path: the log.
        probe: which samples, and on which grid; by default all, on the usual grid.
        names: sample id → name, such as its file.
        learning_rates: the sum of the learning rates up to each checkpoint since the one before; by default
            from the optimisers' states beside the weights, or equal.
        train_batch_size: of the training; it scales the scores of tracin and retrac.
        ema: take the averaged weights.
        layers: see :class:`~diffhook.gradients.PerSampleGradients`; so is ``seed``.
        projection_dim: D; None: that of the log, if there is one, or else 8192, and less where that takes too
            much room, see :func:`~diffhook.capture.projection_dim.usual_dim`.
        pipeline: that makes the dataset's latents and conditions: what its training chose is kept in the log,
            and queries have to be made likewise.
        progress: say what is to be done and, on a terminal, show a progress bar.

    Returns:
        The log, with every row.

    Raises:
        ConfigurationError: checkpoints, model and samples do not fit each other.
        LogError: the log is of something else, or cannot be written; or a checkpoint that it has was changed.
    """
    check_location(path)
    check_objective(objective)
    check_whole("train_batch_size", train_batch_size, 1)
    probe = replace(probe or Probe(samples=None), dataset=dataset)
    samples = len(probe.ids(len(dataset)))
    if not samples:
        raise ConfigurationError("the dataset is empty: there are no samples to measure")
    probe.grid.timesteps_of(objective)
    found = _found(checkpoints, ema)
    if projection_dim is None:
        projection_dim = known_dim(path) or usual_dim(samples, probe.grid.rows * len(found))
    engine = PerSampleGradients(
        model, layers=layers, projection_dim=projection_dim, seed=seed, weight_gradients=False,
        group_size=probe.grid.draws,
    )  # fmt: skip
    chosen = None if pipeline is None else pipeline.chosen
    work = _Work(engine, objective, probe, train_batch_size, path, dict(names or {}), chosen)
    with borrowed(model), work.opened(found, learning_rates) as (writer, measured):
        work.run(writer, measured, progress)
    return open_log(path)


def _found(checkpoints: Paths | Sequence[Checkpoint], ema: bool) -> list[Checkpoint]:
    given = list(checkpoints) if isinstance(checkpoints, Sequence) else []
    found = [checkpoint for checkpoint in given if isinstance(checkpoint, Checkpoint)]
    return found or find_checkpoints(checkpoints, ema=ema)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Loader:
    """What :func:`describe_run` asks of a training's."""

    dataset: Any


@dataclass(frozen=True)
class _Work:
    """One process's share."""

    engine: PerSampleGradients
    objective: Objective
    probe: Probe
    train_batch_size: int
    path: Location
    names: dict[int, str]
    chosen: dict[str, Any] | None

    @contextmanager
    def opened(
        self, checkpoints: Sequence[Checkpoint], learning_rates: Sequence[float] | None
    ) -> Iterator[tuple[LogWriter, PlannedSnapshots]]:
        """A rank of the log that is ours, and the snapshots, which are in the log by now."""
        store = files.open_store(self.path, read_only=False)
        with _alone(store):  # one process at a time says what the log is of
            log = self._known(store)
            measured = plan(checkpoints, log, learning_rates)
            self._check(measured)
            writer = self._writer(store, log, measured.weighted)
            try:
                for snapshot in measured.new:
                    writer.snapshot(snapshot, None)
                writer.keep_names(dict(self.names))
                writer.flush()
            except BaseException:
                writer.close()
                raise
        try:
            yield writer, measured
        finally:
            writer.close()

    def _known(self, store: Store) -> RunLog | None:
        config = find_config(store)
        if config is None:
            return None
        check_log(config, files.describe(store))
        log = open_log(self.path)
        check_names(log, self.names)
        check_appearance(log, self.probe)
        return log

    def _check(self, measured: PlannedSnapshots) -> None:
        """Before anything is written: the last new checkpoint is of this model, which takes a sample."""
        if measured.new:
            load_snapshot(self.engine, measured.new[-1])
        with torch.no_grad(), refused("the model cannot take these samples"):
            self.probe.first_losses(self.engine.model, self.objective)

    def _writer(self, store: Store, log: RunLog | None, weighted: str) -> LogWriter:
        config = describe_run(self.engine, self.objective, _Loader(self.probe.dataset))
        if self.chosen is not None:
            config["identity"]["pipeline"] = self.chosen
        weight = self.train_batch_size / len(self.probe.dataset)
        config["probe"] = {"grid": self.probe.grid.describe(), "weight": weight}
        config["checkpoints"] = {"weighted": weighted}
        run = log.sessions[0].id if log is not None and log.sessions else secrets.token_hex(8)
        return LogWriter(self.path, config, rank=_free_rank(store), run=run, strict=True)

    def run(self, writer: LogWriter, measured: PlannedSnapshots, progress: bool) -> None:
        """Measure what is missing, until nothing is, whoever does it."""
        samples, grid = self.probe.ids(len(self.probe.dataset)), self.probe.grid
        steps = [snapshot.step for snapshot in measured.snapshots]
        held = HeldRows(writer.store, grid.rows)
        held.update()
        total, done = len(steps) * len(samples) * grid.rows, held.count(steps, samples)
        if done < total and progress:
            announce(
                f"diffhook: {plural(len(samples), 'sample')} × {grid.rows} rows at "
                f"{plural(len(steps), 'checkpoint')}, {total - done:,} rows to measure; {measured.words}"
            )
        with progress_bar(progress) as bar:
            task = bar.add_task("measuring", total=total, completed=done)
            share = _Share(self, writer, held, lambda: bar.update(task, completed=held.count(steps, samples)))
            while left := share.left(measured.snapshots, samples):
                first = writer.rank % len(left)  # others begin elsewhere: a checkpoint is loaded once
                found = [share.measure(snapshot, samples) for snapshot in (*left[first:], *left[:first])]
                if not any(found):
                    bar.update(task, description="measuring (others are at the rest)")
                    time.sleep(_WAIT)
                    share.look()
        writer.record("summary.json", {"parameters_left_out": dict(self.engine.coverage.missing)})
        if share.gone:
            raise LogError(" ".join(share.gone.values()))


@dataclass(frozen=True)
class _Share:
    """What this process measures.

    Attributes:
        tell: called when there may be more rows.
        gone: step of a checkpoint that is not what it was → why, in words.
    """

    work: _Work
    writer: LogWriter
    held: HeldRows
    tell: Callable[[], None]
    gone: dict[int, str] = field(default_factory=dict)

    def left(self, snapshots: Sequence[Snapshot], samples: Sequence[int]) -> list[Snapshot]:
        """Those that lack rows, and can be measured."""
        return [s for s in snapshots if s.step not in self.gone and self.held.missing(s.step, samples)]

    def measure(self, snapshot: Snapshot, samples: Sequence[int]) -> bool:
        """The parts of one checkpoint that are left and that nobody else is at. Whether there were any."""
        try:
            return self._measure(snapshot, samples)
        except MovedCheckpointError as error:
            self.gone[snapshot.step] = str(error)
            return True

    def _measure(self, snapshot: Snapshot, samples: Sequence[int]) -> bool:
        model, contrasts, loaded = self.work.engine.model, None, False
        for part in range(_PARTS):
            own = [sample for sample in samples if sample % _PARTS == part]
            if not self.held.missing(snapshot.step, own):
                continue
            name = f"checkpoint-{snapshot.step:08d}-{part:02d}"
            with suppress(LogBusyError), part_lock(self.writer.store, name, f"part {part}"):
                self.held.update()
                left = self.held.missing(snapshot.step, own)
                if left and not loaded:
                    load_snapshot(self.work.engine, snapshot)
                    contrasts, loaded = self.work.probe.contrasts(model, self.work.objective), True
                self._rows(snapshot, left, contrasts)
        return loaded

    def _rows(self, snapshot: Snapshot, samples: Sequence[int], contrasts: Any) -> None:
        """On the disk when this returns: the part is then given back."""
        if not samples:
            return
        probe, flushed = self.work.probe, time.monotonic()
        rows = probe.run(
            self.work.engine, self.work.objective, samples, contrasts, step=snapshot.step,
            lr_sum=snapshot.lr_sum, batch_per_step=self.work.train_batch_size,
            done=self.held.cells(snapshot.step, samples),
        )  # fmt: skip
        for some in rows:
            if not self.writer.put("probe", some):
                raise LogError(
                    "rows cannot be written: the disk is full, or fails. The same call, made again, measures "
                    "what is missing"
                )
            if time.monotonic() - flushed > _FLUSH:
                self.writer.flush()
                self.look()
                flushed = time.monotonic()
        self.writer.flush()
        self.look()

    def look(self) -> None:
        """At what there is by now, of all processes."""
        self.held.update()
        self.tell()


def _free_rank(store: Store) -> int:
    """The first rank that no process writes; within :func:`_alone`."""
    for rank in range(_MOST_PROCESSES):
        with suppress(LogBusyError), rank_lock(store, rank):
            return rank
    raise LogError(f"{files.describe(store)} is written by {_MOST_PROCESSES} processes already")


@contextmanager
def _alone(store: Store) -> Iterator[None]:
    """As the only process that opens the log, after waiting for others."""
    with ExitStack() as held:
        waiting = False
        while True:
            try:
                held.enter_context(part_lock(store, "checkpoints", "the beginning"))
                break
            except LogBusyError:
                if not waiting:
                    logger.info("another process is opening %s: waiting", files.describe(store))
                waiting = True
                time.sleep(_WAIT)
        yield
