"""Probes at the snapshots of a run, by one process or by several that share the samples."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from itertools import islice
from typing import Any, Protocol, TypeVar

from diffhook.capture.model.borrowing import trainable, undisturbed, unengaged
from diffhook.capture.objective import Objective
from diffhook.capture.objective.diffusion import DiffusionObjective
from diffhook.capture.probes.grid import Grid
from diffhook.capture.probes.last_probe import last_probe
from diffhook.capture.probes.probe import Probe
from diffhook.console import announce
from diffhook.gradients import PerSampleGradients
from diffhook.log import Rows
from diffhook.words import plural

logger = logging.getLogger("diffhook")

Put = Callable[[str, Rows], object]
Result = TypeVar("Result")

_FAILED = {
    False: "probes have stopped; training rows go on. %s: %s",
    True: "no probe at the end, which takes the model as the training leaves it: end the training "
    "(accelerator.end_training(), hook.close()) before the model is changed. %s: %s",
}


class Sharing(Protocol):
    """How the processes of a run share the samples of a probe. None of it is a collective."""

    def begin(self, step: int) -> None:
        """The first process finds out on what terms, which may take a while: the others wait."""

    def offer(self, step: int, terms: Mapping[str, Any] | None) -> None:
        """The first process says on what terms the snapshot of a step is probed; None: it is not."""

    def terms(self, step: int) -> Mapping[str, Any] | None:
        """What it has said, for the other processes, which wait for it a while."""

    def claim(self, step: int, sample: int) -> bool:
        """Whether nobody else has this sample, which is ours then."""

    def done(self, step: int) -> None:
        """This process's rows are on the disk."""

    def settle(self, step: int) -> None:
        """The first process waits for the others that have taken part."""


class Prober:
    """Measures chosen samples at snapshots. What fails in it ends the probes, not the capture of rows.

    Args:
        engine: on the trained model.
        put: takes rows for a table.
        flush: sees them to the disk.
        objective, probe: None: nothing is probed.
        begin: told of the grid, before there are rows on it.
        sharing: with the run's other processes; None: there are none.
        at_end: the budget decides at the end; nothing is probed at other snapshots.
        strict: raise what fails.

    Attributes:
        weights: gives the model those that it is measured with, for so long.
    """

    def __init__(
        self,
        engine: PerSampleGradients,
        put: Put,
        flush: Callable[[], object],
        objective: Objective | None,
        probe: Probe | None,
        *,
        begin: Callable[[Grid], object] = lambda grid: None,
        sharing: Sharing | None = None,
        at_end: bool = False,
        strict: bool = False,
    ) -> None:
        self.objective, self.probe = objective, probe
        self.waits_for_end = at_end
        self.weights: Callable[[], AbstractContextManager[object]] = nullcontext
        self.seconds, self.rows = 0.0, 0
        self._engine, self._put, self._flush = engine, put, flush
        self._begin = begin
        self._make_probe: Callable[[], Probe] | None = None
        self._sharing, self._strict = sharing, strict
        self._going = True  # until one fails

    def probe_with(self, objective: Objective | None, probe: Callable[[], Probe]) -> None:
        """From the next snapshot on.

        Args:
            objective: the loss as it was recognised; None: it is not, or turned out to be another one. What
                the first process has recognised counts for all.
            probe: gives the samples that there are by then.
        """
        self.objective, self._make_probe = objective, probe

    def probe_none(self) -> None:
        """From now on: the samples' inputs cannot be given again."""
        self.objective = self.probe = self._make_probe = None

    def at_snapshot(self, step: int, lr_sum: float, batch_per_step: int) -> None:
        """The first process has taken a snapshot."""
        if self.waits_for_end:
            return
        objective, probe = self.objective, self._ready()
        if objective is None or probe is None or not self._going:
            self.not_taken(step)
            return
        if not self.seconds and (samples := len(probe.ids(len(probe.dataset)))):
            announce(
                f"diffhook: probing {samples:,} samples at step {step:,}; training pauses at each snapshot"
            )
        self._share(objective, probe, step, lr_sum, batch_per_step)

    def at_end(
        self,
        step: int,
        lr_sum: float,
        batch_per_step: int,
        budget: float,
        processes: int,
        grid: Grid | None = None,
    ) -> None:
        """The training is over, and the first process has a snapshot of its parameters.

        All samples are probed, as well as ``budget`` seconds allow; says what comes of it.

        Args:
            processes: that share the samples.
            grid: that the log has rows on; None: there are none.
        """
        objective, probe, chosen = self.objective, self._ready(), None
        if objective is not None and probe is not None and self._going:
            chosen = self._guarded(lambda: self._last(step, objective, probe, budget, processes, grid))
        if objective is None or chosen is None:
            self.not_taken(step)
        else:
            self._share(objective, chosen, step, lr_sum, batch_per_step)

    def _last(
        self,
        step: int,
        objective: Objective,
        probe: Probe,
        budget: float,
        processes: int,
        grid: Grid | None,
    ) -> Probe | None:
        if self._sharing is not None:
            self._sharing.begin(step)
        with self._measuring(grid or probe.grid) as engine:
            return last_probe(probe, engine, objective, budget, processes=processes, grid=grid)

    def _share(
        self, objective: Objective, probe: Probe, step: int, lr_sum: float, batch_per_step: int
    ) -> None:
        """Probe, with the other processes."""
        self._guarded(lambda: self._begin(probe.grid))
        if self._sharing is not None:
            recognised = self._make_probe is not None
            terms: dict[str, Any] = {"lr_sum": lr_sum, "batch": batch_per_step}
            terms |= {"grid": probe.grid.describe(), "labels": probe.label_timesteps}
            self._sharing.offer(step, {**terms, "objective": objective.describe() if recognised else None})
        self._guarded(lambda: self._run(objective, probe, step, lr_sum, batch_per_step))
        if self._sharing is not None:
            self._sharing.settle(step)

    def beside(self, step: int, *, at_end: bool = False) -> None:
        """Another process has come to a step at which the first one takes a snapshot, or to the end."""
        probes = self._going and (self.probe is not None or self._make_probe is not None)
        if self._sharing is None or not probes or at_end != self.waits_for_end:
            return
        terms = self._sharing.terms(step)
        probe = self._ready()
        if terms is None or probe is None:
            return
        probe = replace(probe, grid=Grid(**terms["grid"]), label_timesteps=terms["labels"])
        described = terms.get("objective")
        objective = self.objective if described is None else DiffusionObjective.from_description(described)
        if objective is not None:
            self._guarded(lambda: self._run(objective, probe, step, terms["lr_sum"], terms["batch"]))
        self._sharing.done(step)

    def not_taken(self, step: int) -> None:
        """The first process has not taken a snapshot, or does not probe it."""
        if self._sharing is not None:
            self._sharing.offer(step, None)

    def _ready(self) -> Probe | None:
        return self.probe if self._make_probe is None else self._make_probe()

    def _guarded(self, run: Callable[[], Result]) -> Result | None:
        try:
            return run()
        except Exception as error:
            self._going = False
            if self._strict:
                raise
            logger.error(_FAILED[self.waits_for_end], type(error).__name__, error)
            return None

    def _run(self, objective: Objective, probe: Probe, step: int, lr_sum: float, batch: int) -> None:
        samples = probe.ids(len(probe.dataset))
        if not samples:
            return
        with self._measuring(probe.grid) as engine:
            with undisturbed(engine.model):
                contrasts = probe.contrasts(engine.model, objective)
            for some in self._shares(probe, samples, step):
                for rows in probe.run(
                    engine, objective, some, contrasts, step=step, lr_sum=lr_sum, batch_per_step=batch
                ):
                    self._put("probe", rows)
                    self.rows += len(rows["sample"])
        if self._sharing is not None:
            self._flush()

    @contextmanager
    def _measuring(self, grid: Grid) -> Iterator[PerSampleGradients]:
        """An engine for a grid, on what was trained; accounts for the time."""
        began = time.perf_counter()
        try:
            with (
                trainable(self._engine.parameters.values()),
                self.weights(),
                unengaged(self._engine.model) as model,
            ):
                yield self._engine.sibling(model, group_size=grid.draws)
        except KeyboardInterrupt:
            announce(f"diffhook: probes were interrupted after {plural(self.rows, 'row')}")
            raise
        finally:
            self.seconds += time.perf_counter() - began

    def _shares(self, probe: Probe, samples: list[int], step: int) -> Iterator[list[int]]:
        """Indices of the samples that this process measures: all, or batches that it has claimed."""
        sharing = self._sharing
        if sharing is None:
            yield samples
            return
        names = probe.names or range(len(probe.dataset))
        mine = (index for index in samples if sharing.claim(step, names[index]))
        while some := list(islice(mine, probe.batch_size)):
            yield some
