"""Turns captured passes into rows of the log."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from diffhook.appearance import COLUMNS
from diffhook.capture.alerts import Alerts, Detector, Watch
from diffhook.capture.model.borrowing import holding
from diffhook.capture.objective import Objective
from diffhook.capture.probes.grid import Grid
from diffhook.capture.probes.probe import Probe
from diffhook.capture.probes.prober import Prober, Sharing
from diffhook.capture.recording.incoming_rows import IncomingRows
from diffhook.capture.recording.snapshot_contents import SnapshotContents
from diffhook.capture.recording.timestep_units import TimestepUnits
from diffhook.capture.recording.waiting_rows import WaitingRows
from diffhook.capture.rows import make_rows
from diffhook.capture.samples.familiarity import Familiarity
from diffhook.capture.samples.regularisation import roles
from diffhook.errors import LogError
from diffhook.gradients import PerSampleGradients
from diffhook.log import LogWriter, Rows, Snapshot, open_log
from diffhook.log.grid import GRID
from diffhook.log.schema import SCALARS
from diffhook.log.store import Location
from diffhook.words import plural

logger = logging.getLogger("diffhook")

_LONGEST_WAIT = 60.0  # seconds that saving a checkpoint waits for a slow disk …
_ONE_MORE_TRY = 1.0  # … and for one that fails, or has not come on in that time


class Recorder:
    """One process's capture: an engine on the model, a writer on the log, alerts between them.

    Knows no training loop: whoever does calls :meth:`captured`, :meth:`stepped` or :meth:`skipped`, and
    :meth:`snapshot` at the right moments.

    Args:
        engine: on the trained model.
        location: the log's.
        config: the run's configuration, see :class:`diffhook.log.LogWriter`.
        rank, processes: this process, and how many there are.
        start_step: optimiser steps taken before.
        after, run: of which session the checkpoint is, and an id of this start, see
            :class:`diffhook.log.LogWriter`.
        lr_sum: sum of the learning rates since the last snapshot, when resuming.
        alerts: who looks for trouble and who is told; None for the usual.
        objective, probe: what to probe at snapshots; None for no probes.
        sharing: of probes with the run's other processes.
        probe_at_end: see :meth:`probe_at_end`; snapshots are not probed then.
        preconditioner: what snapshots keep of the optimiser, see
            :func:`~diffhook.capture.recording.preconditioner.adam_preconditioner`; None: nothing.
        snapshot_dtype, meet: see :class:`~diffhook.capture.recording.snapshot_contents.SnapshotContents`.
        strict: raise at the first write that fails.
    """

    def __init__(
        self,
        engine: PerSampleGradients,
        location: Location,
        config: Mapping[str, Any],
        *,
        rank: int = 0,
        processes: int | None = None,
        start_step: int = 0,
        after: str | None = None,
        run: str | None = None,
        lr_sum: float = 0.0,
        alerts: Alerts | Sequence[Detector] | None = None,
        objective: Objective | None = None,
        probe: Probe | None = None,
        sharing: Sharing | None = None,
        probe_at_end: bool = False,
        preconditioner: Callable[[Mapping[str, nn.Parameter]], Mapping[str, Tensor]] | None = None,
        snapshot_dtype: torch.dtype | None = None,
        meet: Callable[[str], bool] = lambda what: True,
        strict: bool = False,
    ) -> None:
        self.engine, self.rank = engine, rank
        self.rows_written = 0
        self.rows_without_loss = 0  # of those
        self.snapshots_written = 0
        self.snapshot_seconds = 0.0  # and of checkpoints, for which rows go to the disk
        self._names: Mapping[int, str] | None = None  # by which samples are recognised
        self.regularisation: Set[int] = set()  #: ids of samples that are regularisation images; may grow
        self.lr_sum = lr_sum
        self._lr = self._lr_total = 0.0
        self._told_waiting = False
        self._last_snapshot: int | None = None
        self._kept_snapshot: int | None = None
        self._batch_per_step = 1
        self._contents = SnapshotContents(engine, snapshot_dtype, preconditioner, meet)
        if probe is not None and not probe_at_end:
            config = {**config, "probe": {"grid": probe.grid.describe()}}  # queries take the same
        self.writer = LogWriter(
            location, config, rank=rank, processes=processes, start_step=start_step, after=after, run=run,
            strict=strict,
        )  # fmt: skip
        with ExitStack() as undo:  # else the next try would find the log held by this one
            undo.callback(self.writer.close)
            self.prober = Prober(
                engine, self.writer.put, self.settle, objective, probe,
                begin=self._keep_grid, sharing=sharing, at_end=probe_at_end, strict=strict,
            )  # fmt: skip
            self._waiting = WaitingRows()
            self.units = TimestepUnits(None if objective is None else objective.timestep_scale)
            size = (config["identity"].get("dataset") or {}).get("samples")
            self.incoming = IncomingRows(self._known(size), self.units, self._put)
            self.watch = Watch(alerts, self.writer.alert, lambda: self.writer.past().alerts(), rank, strict)
            if start_step:
                self._resume(start_step)
            engine.attach()
            undo.pop_all()

    def _resume(self, step: int) -> None:
        """Learn what was before: the detectors' thresholds, and whether the checkpoint's step is probed."""
        try:
            past = self.writer.past()
            if any(snapshot.step == step for snapshot in past.snapshots):
                self._last_snapshot = self._kept_snapshot = step
            self.watch.resume(past)
        except LogError as error:
            logger.warning("detectors warm up again, because the rows of before cannot be read: %s", error)

    def _known(self, size: int | None) -> Familiarity | None:
        """What the log that this run writes into knows of its samples, of which there are ``size``."""
        if self.writer.session < 1:  # a new one, or one that is away
            return None
        with suppress(LogError, OSError):
            return Familiarity.of(open_log(self.writer.store), size)
        return None

    def keep_names(self, names: dict[int, str], *, telling: bool = True) -> None:
        """Names of samples for the log and for alerts: id → name; may grow, and gets what the log has.

        Args:
            telling: samples that the log does not know may show that it is of another dataset.
        """
        self._names = names if telling else None
        self.writer.keep_names(names)
        self.watch.know(names)

    @property
    def alerts(self) -> list[str]:
        """The kinds of the alerts raised so far."""
        return self.watch.kinds

    def captured(
        self,
        sample_ids: Tensor,
        timesteps: Tensor,
        *,
        step: int,
        weight: float,
        factors: Tensor | None = None,
        losses: Tensor | None = None,
        appearance: Tensor | None = None,
    ) -> np.ndarray:
        """Stage the rows of the pass that the engine has just finished.

        Args:
            sample_ids: (B,) int64.
            timesteps: (B,).
            step: optimiser steps taken before.
            weight: coefficient with which a sample's own gradient enters the step's update,
                times the capture stride.
            factors: (B,) with which it does besides, and in the engine's gradients; None: 1.
            losses: (B,) the samples' own losses, where known.
            appearance: (B, 3) of the clean samples, where known.

        Returns:
            (B,) float32 norms of the samples' gradients.
        """
        count = len(sample_ids)
        rows = make_rows(
            self.engine,
            factors=factors,
            sample=sample_ids.cpu().numpy(),
            step=np.full(count, step),
            timestep=timesteps.float().cpu().numpy(),
            noise_seed=np.full(count, -1),
            lr=np.full(count, np.nan),
            loss=np.full(count, np.nan) if losses is None else losses.float().cpu().numpy(),
            weight=np.full(count, weight if factors is None else weight * factors.numpy()),
            role=roles(sample_ids, self.regularisation),
        )
        statistics = np.full((len(COLUMNS), count), np.nan, np.float32)
        if appearance is not None:
            statistics[:] = appearance.cpu().numpy().T
        norms: np.ndarray = rows["grad_norm"]
        layer = None if np.isfinite(norms).all() else self.engine.first_nonfinite
        self._waiting.stage({**rows, **dict(zip(COLUMNS, statistics, strict=True))}, layer)
        return norms

    @property
    def staged_rows(self) -> int:
        """Rows that wait for their optimiser step."""
        return len(self._waiting)

    def stepped(self, lr: float, batch: int, *, hold: bool = False) -> None:
        """An optimiser step was taken with learning rate ``lr``: its rows are complete.

        Args:
            lr: the rate of that step.
            batch: samples of the step, over all processes; 0: not known.
            hold: keep the rows until :meth:`release_held` or :meth:`forget_held`.
        """
        self._lr = lr
        self.lr_sum += lr
        self._lr_total += lr
        self._batch_per_step = batch or self._batch_per_step
        self._waiting.complete(lr)
        self._waiting.holding = hold
        if not hold:
            self.release_held()

    def skipped(self) -> None:
        """The staged rows' step was skipped (overflow): they moved nothing, so their lr is 0."""
        self._waiting.complete(0.0)
        if not self._waiting.holding:
            self.release_held()

    def forget_staged(self) -> int:
        """Rows whose optimiser step could not be followed are not written. Returns of how many passes."""
        return self._waiting.forget_staged()

    def forget_held(self) -> None:
        """Rows that turned out to be wrong are not written."""
        self._waiting.forget_held()

    def release_held(self) -> None:
        """Write the rows that are complete."""
        for rows, layer in self._waiting.released():
            self.incoming.add(rows, layer, self._names)

    def finish(self) -> None:
        """No more rows will come: all that wait are written."""
        with ExitStack() as leaving:  # whatever fails; the last one first
            leaving.callback(self.incoming.release)
            leaving.callback(self.release_held)
            leaving.callback(self.skipped)

    def _put(self, rows: Rows, layer: str | None) -> None:
        if self.writer.put("train", rows):
            self.rows_written += len(rows["sample"])
            self.rows_without_loss += int(np.isnan(rows["loss"]).sum())
        scalars = {name: values for name, values in rows.items() if name in SCALARS}
        self.watch.look(scalars, layer)

    def settle(self, *, wait: bool = True) -> None:
        """A checkpoint is about to be written: a process killed later resumes from it, so the rows
        before it go to the disk first.

        Takes a minute at most. Once that was in vain, or where writing fails, checkpoints wait a second
        each until something is written again.

        Args:
            wait: until they are there.
        """
        told, began = self.writer.failing, time.perf_counter()
        self.incoming.settle()
        if (waiting := len(self.incoming)) and not self._told_waiting:
            self._told_waiting = True
            logger.warning(
                "%s before this checkpoint wait in memory until the training loss is recognised, which tells "
                "the units of their timesteps: a process that is killed before loses them",
                plural(waiting, "row"),
            )
        try:
            self.writer.flush((_ONE_MORE_TRY if told else _LONGEST_WAIT) if wait else 0.0)
        except LogError as error:
            level = logging.INFO if told or error.told else logging.WARNING
            logger.log(level, "rows before this checkpoint are not on the disk yet: %s", error)
        finally:
            self.snapshot_seconds += time.perf_counter() - began

    @property
    def row_bytes(self) -> int:
        """Bytes of the training rows that this process has written."""
        return self.rows_written * self.writer.bytes_per_row

    @property
    def snapshot_bytes(self) -> int:
        """Bytes that a snapshot takes."""
        return self._contents.size

    def snapshot(self, step: int, *, loaded: bool = False, probed: bool = True) -> None:
        """Keep the trainable parameters as they are after ``step`` steps, which rank 0 does, and probe. A
        second call at the same step does nothing.

        Args:
            loaded: the loop has put others in their place since the last step, which the snapshot says.
            probed: may be probed.
        """
        if self._last_snapshot == step:
            return
        self._last_snapshot = step
        began = time.perf_counter()
        content = self._contents.of(step, keep=not self.rank)
        if self.rank:
            self.prober.beside(step)
            return
        kept = Snapshot(step, self._lr, self.lr_sum, details={"loaded": True} if loaded else {})
        taken = content is not None and self.writer.snapshot(kept, *content)
        self.snapshot_seconds += time.perf_counter() - began
        if not taken:
            self.prober.not_taken(step)
            return  # the next one stands for these steps too
        self.snapshots_written += 1
        self._kept_snapshot = step
        lr_sum, self.lr_sum = self.lr_sum, 0.0
        if probed:
            self.prober.at_snapshot(step, lr_sum, self._batch_per_step)
        else:
            self.prober.not_taken(step)

    def _known_grid(self) -> Grid | None:
        """That the log's probes are on, so that further ones are, too."""
        with suppress(LogError):
            found = self.writer.past().grid
            return None if found is None else Grid(**found)
        return None

    def _keep_grid(self, grid: Grid) -> None:
        if self._known_grid() is None:
            self.writer.record(GRID, {"grid": grid.describe()})

    def probe_at_end(
        self, step: int, budget: float, processes: int, *, probed: bool = True, as_kept: bool = False
    ) -> None:
        """Probe all samples after the last step, as well as so many seconds allow.

        Args:
            step: steps taken; nothing is probed without a snapshot of it.
            processes: that share the samples.
            probed: may be probed; what the first process says counts.
            as_kept: with the parameters of that snapshot: the model has others by now.
        """
        if as_kept:
            self.prober.weights = partial(self._as_kept, step)
        if self.rank:
            self.prober.beside(step, at_end=True)
        elif self._kept_snapshot == step and probed:
            self.settle()  # whoever has no patience for it loses no row
            rate, grid = self._lr_total or 1.0, self._known_grid()
            self.prober.at_end(step, rate, self._batch_per_step, budget, processes, grid)
        else:
            self.prober.not_taken(step)

    @contextmanager
    def _as_kept(self, step: int) -> Iterator[None]:
        """The model with the parameters of a snapshot; afterwards with its own.

        Raises:
            LogError: it is not on the disk, or cannot be read.
        """
        snapshot = next((each for each in self.writer.past().snapshots if each.step == step), None)
        if snapshot is None:
            raise LogError(f"the snapshot of step {step} is not on the disk yet, and the model has others")
        with holding(self.engine.trained, safetensors.torch.load(snapshot.parameters())):
            yield

    def close(self, *, mid_pass: bool = False) -> None:
        """Flush and let go of model and log. Idempotent.

        Args:
            mid_pass: see :meth:`PerSampleGradients.detach`.
        """
        with ExitStack() as leaving:  # whatever fails, all of it is let go; the last one first
            leaving.callback(self.writer.close)
            leaving.callback(self.watch.close)
            leaving.callback(self.finish)
            leaving.callback(self.engine.detach, mid_pass=mid_pass)
