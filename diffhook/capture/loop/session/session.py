"""Follows one process's training loop from event to event, and feeds the recorder."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from diffhook.capture import Plan, Recorder
from diffhook.capture.loop import events
from diffhook.capture.loop.identity import Unmatched
from diffhook.capture.loop.micro_batch import MicroBatch
from diffhook.capture.loop.run.absences import REASONS, Absences
from diffhook.capture.loop.session.snapshots import SnapshotTaker
from diffhook.capture.loop.session.staging import Staging
from diffhook.capture.loop.session.training_pass import BatchProgress, TrainingPass
from diffhook.capture.loop.steps.steps import Steps
from diffhook.capture.loop.steps.trained_set import TrainedSet
from diffhook.capture.loop.tracing.row_finder import UNSHOWN, RowFinder
from diffhook.capture.loop.watches.call_inspection import timestep_last
from diffhook.capture.loop.watches.training_thread import TrainingThread
from diffhook.errors import RecheckNeeded

_IN_A_ROW = 3  # forwards without a backward, or batches without a forward: then it is told
_FETCHED_ELSEWHERE = Unmatched("fetched-elsewhere", REASONS["fetched-elsewhere"])
_GIVEN_UP = Unmatched("given-up", "another part of its batch was left out, and the rest goes with it")


class CaptureSession:
    """One process's loop: :meth:`on` takes its events in the order of :mod:`diffhook.capture.loop.events`.

    Args:
        plan: which steps to capture.
        start: makes the recorder at the first training forward, given that micro-batch.
        steps_are_seen: whether an optimiser of the trained parameters is known.
        snapshot_every: optimiser steps between snapshots.
        rank, processes: this process's number, and how many share the batch.
        staging: makes rows of passes.
        shield: through which runs what is called by the loop's own operations.
    """

    def __init__(
        self,
        plan: Plan,
        start: Callable[[MicroBatch], Recorder],
        steps_are_seen: Callable[[], bool],
        *,
        snapshot_every: int | None = None,
        rank: int = 0,
        processes: int = 1,
        staging: Callable[..., Staging],
        shield: Callable[..., Any],
    ) -> None:
        self.plan = plan
        self.recorder: Recorder | None = None
        self.under_way: TrainingPass | None = None  #: a captured forward waits for its backward, or is in it
        self.absences = Absences()
        self.thread = TrainingThread()
        self.rows = RowFinder(shield)
        self.steps = Steps(plan, self.absences, steps_are_seen, rank, processes)
        self.staging = staging(plan, self.steps, self.absences, self.rows.trace.aside)
        self.snapshots = SnapshotTaker(self.steps, snapshot_every)
        self._start = start
        self._trained: TrainedSet  # of the recorder
        self._batch = BatchProgress()
        self._handlers: dict[type[events.Event], Callable[[Any], None]] = {
            events.BatchReceived: self._batch_received,
            events.LoaderEnded: self._loader_ended,
            events.ForwardBegan: self._forward_began,
            events.DenoiserCalled: self._denoiser_called,
            events.OutputSeen: self._output_seen,
            events.LossScaled: self._loss_scaled,
            events.BackwardBegan: self._backward_began,
            events.BackwardEnded: self._backward_ended,
            events.StepBegan: self._step_began,
            events.StepEnded: self._step_ended,
            events.GradientsZeroed: lambda _: self.steps.zeroed(),
            events.SnapshotDue: lambda _: self._snapshot_due(),
        }

    def on(self, event: events.Event) -> None:
        """Take the next event."""
        self.staging.read_before(event)  # once more, for events of our own, which come without Capture.on
        if not self.snapshots.measuring:
            self._handlers[type(event)](event)
            self.staging.throttling.follow(event, self.steps.whose, self.rows)

    @property
    def started(self) -> bool:
        """Whether rows are being logged."""
        return self.recorder is not None

    @property
    def in_pass(self) -> bool:
        """Whether a captured forward waits for its backward."""
        return self.under_way is not None

    @property
    def expects_backward(self) -> bool:
        """Whether a backward to come may be of a captured forward, also of one that had its own."""
        return self.under_way is not None or self._batch.staged

    @property
    def expects_capture(self) -> bool:
        """Whether the next training forward on the batch at hand may be captured."""
        return self.rows.last is not None and self.steps.captured

    @property
    def uses(self) -> int:
        """How many uses of trained parameters the pass under way has shown; 0 once the log has ended."""
        return 0 if self.under_way is None or self.recorder is None else self.under_way.uses

    def abandon(self) -> None:
        """Give up the pass under way: its rows are left out."""
        abandoned, self.under_way = self.under_way, None
        self._batch.reached = False
        if abandoned is not None and self.recorder is not None:
            abandoned.abandon()

    def give_up(self) -> None:
        """Leave the batch at hand out. Its layers must not be hooked anew before the backward, in which
        checkpointed blocks save what they saved."""
        self.abandon()
        self.rows.give_up(_GIVEN_UP)

    def failed(self, reason: str) -> None:
        """An error of ours costs the batch at hand; once that is staged, what was captured for its step."""
        self.steps.end_missed = self.steps.inside
        self.staging.forget()
        self.give_up()
        staged = self._batch.staged and self.staging.made
        lost = self.recorder.forget_staged() if staged and self.recorder is not None else 1
        self.absences.count(reason, max(lost, 1))

    # ── a batch ───────────────────────────────────────────────────────────────────────────────

    def fetched_elsewhere(self) -> None:
        """A batch of the training has come in another thread than it trains in."""
        self.thread.fetched()
        self.absences.tell("fetched-elsewhere")

    def _batch_received(self, event: events.BatchReceived) -> None:
        self.thread.fetched()
        self._count_missing_backward()
        if self.started and self.steps.captured and self.rows.unused:
            self.absences.count("no-forward")
            if self.rows.unused == _IN_A_ROW:
                self.absences.tell("no-forward", None, _IN_A_ROW)
        self.abandon()
        self._settle_unseen_step()
        self.steps.settle_lost()
        self._batch = BatchProgress()
        self.staging.objective.batch_received(event)
        self.rows.received(event, captured=self.steps.captured, captured_next=self.steps.captured_next)

    def _count_missing_backward(self) -> None:
        """A loss that is not finite is skipped now and then. Where no backward ever comes, that is told."""
        if self.under_way is None:
            return
        self.absences.count("no-backward")
        if self.absences.counts["no-backward"] == _IN_A_ROW and not self.staging.passes:
            self.absences.tell("no-backward", None, _IN_A_ROW)

    def _loader_ended(self, event: events.LoaderEnded) -> None:
        if self.rows.ended(event.source):  # a pass that the loop left early ends as garbage, at any time
            self._count_missing_backward()
            self.abandon()
            self._settle_unseen_step()

    # ── forward ───────────────────────────────────────────────────────────────────────────────

    def _forward_began(self, event: events.ForwardBegan) -> None:
        if not event.training:
            self.rows.used()
            return
        if not event.presumed:
            self.rows.pause()
            self.thread.trains()
        values = timestep_last(event.module, event.args, event.kwargs)
        if self.under_way is not None:
            self._look_again(self.under_way, values)
        else:
            if self.thread.fetched_elsewhere:
                self.rows.give_up(_FETCHED_ELSEWHERE)
            self.steps.whose = found = self.rows.called(values)
            if not isinstance(found, MicroBatch):
                self.steps.unnamed = self.steps.unnamed or found is not _GIVEN_UP
                return
            self.steps.clock.forward_began()
            self._settle_unseen_step()
            if self.steps.closure_captured or not self.steps.captured:
                return
            self._begin_pass(found, event)
        if self.under_way is not None and self.recorder is not None:
            self.under_way.model_called(event, values)

    def _begin_pass(self, found: MicroBatch, event: events.ForwardBegan) -> None:
        if self.recorder is None:
            self.recorder = self._start(found)
            self.steps.follow(self.recorder)
            self._trained = TrainedSet(self.recorder.engine.model, self.recorder.engine.parameters)
        if added := self._trained.added():
            self.give_up()
            names = ", ".join(added[:3]) + (" …" if len(added) > 3 else "")
            self.absences.leave_out("other-parameters", None, len(added), names)
            return
        self.thread.trains()
        scaled = self._batch.scaled
        self.under_way = TrainingPass(
            found.knowing(scale=scaled.scale, accumulation=scaled.accumulation),
            event,
            self.recorder,
            self.staging.losses,
            observed=self.staging.objective.observes_of(found.ids),
        )
        self.steps.pass_begins()
        self.under_way.begin()

    def _denoiser_called(self, event: events.DenoiserCalled) -> None:
        if (under_way := self.under_way) is not None:
            self._look_again(under_way, timestep_last(event.module, event.args, event.kwargs))
            under_way.called(event)

    def _look_again(self, under_way: TrainingPass, values: Iterable[Any]) -> None:
        """A further call before the backward may show whose the rows are, or that they are others'."""
        found = self.rows.shown(values)
        if isinstance(found, MicroBatch) and not under_way.is_of(found):
            self.give_up()
            self.absences.leave_out("several-batches")

    def _output_seen(self, event: events.OutputSeen) -> None:
        under_way = self.under_way
        if under_way is None or self.recorder is None:
            self.rows.resume()
            return
        if event.module is under_way.host:
            self.rows.resume()
            if not under_way.uses:
                self.abandon()  # a frozen model, or a copy
                if not under_way.presumed and self._trained.is_another(event.module):
                    self.absences.leave_out("later-model", None, type(event.module).__name__)
                return
        under_way.answered(event, self._on_reached)

    def _on_reached(self, _: Tensor) -> None:
        if self.steps.in_backward:
            self._batch.reached = True
        elif torch.is_grad_enabled() and self.under_way is not None:
            self.under_way.unfit = "double-backward"  # torch.autograd.grad(..., create_graph=True) alone

    # ── backward ──────────────────────────────────────────────────────────────────────────────

    def _loss_scaled(self, event: events.LossScaled) -> None:
        if self.under_way is not None:
            self.under_way.learn(scale=event.scale, accumulation=event.accumulation)
        else:
            self._batch.scaled = event

    def _backward_began(self, event: events.BackwardBegan) -> None:
        self.rows.pause()
        self.steps.in_backward, self._batch.reached = True, False
        if self.under_way is not None and self.recorder is not None:
            self.under_way.backward_began(event)

    def _backward_ended(self, event: events.BackwardEnded) -> None:
        try:
            self._pass_ended(event)
        finally:
            self.rows.resume()
            if self.steps.ended_within:
                self.staging.read()
            if self.steps.backward_ended():
                self.snapshots.after_step(self.recorder)

    def _pass_ended(self, event: events.BackwardEnded) -> None:
        under_way, batch = self.under_way, self._batch
        if under_way is not None and self.recorder is not None:
            under_way.backward_ended()
            if event.failed:
                self.abandon()
                self.absences.count("failed-backward")
            elif under_way.unfit:
                self.give_up()
                self.absences.leave_out(under_way.unfit)
            elif batch.reached or under_way.engine.tape.seconds > 0:
                self._stage(under_way)
        elif batch.reached and batch.staged and self.recorder is not None:
            self.absences.tell("several-backwards")
            self.absences.count("several-backwards", self.recorder.forget_staged())

    def _stage(self, ended: TrainingPass) -> None:
        """The gradients of a pass are there: its rows wait for the optimiser's step."""
        timesteps = self.staging.timesteps(ended)
        if timesteps is None or not ended.micro_batch.shown:
            self.give_up()
            if not ended.micro_batch.shown:
                self.absences.leave_out(UNSHOWN.kind, UNSHOWN.reason)
            return
        began = self.steps.clock.now()
        try:
            ended.finish()
        except RecheckNeeded as again:
            self.absences.leave_out(f"recheck-{again.law}", "%s", again)
            return
        finally:
            self.abandon()
        if not self.staging.stage(ended, timesteps):
            self.give_up()
            return
        self._batch.staged = True
        seconds = self.steps.clock.now() - began + ended.engine.hook_seconds
        self.steps.pass_ended(self.staging.samples(ended), seconds)

    # ── an optimiser step ─────────────────────────────────────────────────────────────────────

    def _step_began(self, event: events.StepBegan) -> None:
        if not event.closure:
            self.rows.pause()
        self.steps.began()

    def _step_ended(self, event: events.StepEnded) -> None:
        self.rows.stepped()
        captured = self.recorder is None or self.steps.captured
        if self.steps.unnamed and not self.steps.samples and captured and not self.steps.in_backward:
            self.absences.leave_out_unnamed(self.steps.whose)
        if self.steps.ended(event):
            self.snapshots.after_step(self.recorder)

    def _settle_unseen_step(self) -> None:
        if self.steps.settle_unseen():
            self.snapshots.after_step(self.recorder)

    def settle_held(self) -> None:
        """Complete rows need not wait for the next call of the model: a checkpoint or the end comes first."""
        self.staging.read()
        if self.recorder is not None:
            self.steps.check_restored(self.recorder)

    def _snapshot_due(self) -> None:
        self.settle_held()
        self.snapshots.take(self.recorder)
