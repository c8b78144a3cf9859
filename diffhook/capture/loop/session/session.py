"""Follows one process's training loop from event to event, and feeds the recorder."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from diffhook.capture import Plan, Recorder
from diffhook.capture.loop import events
from diffhook.capture.loop.identity import Unmatched
from diffhook.capture.loop.losses.denoiser_calls import DenoiserCalls
from diffhook.capture.loop.losses.row_losses import unexplained_factor
from diffhook.capture.loop.micro_batch import MicroBatch
from diffhook.capture.loop.run.absences import Absences
from diffhook.capture.loop.session.staging import Staging
from diffhook.capture.loop.steps.steps import Steps
from diffhook.capture.loop.steps.trained_set import TrainedSet
from diffhook.capture.loop.tracing.row_finder import UNSHOWN, RowFinder
from diffhook.capture.loop.watches.call_inspection import timestep_last
from diffhook.errors import RecheckNeeded

_IN_A_ROW = 3  # forwards without a backward, or batches without a forward: then it is told
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
        self.absences = Absences()
        self.rows = RowFinder(shield)
        self.steps = Steps(plan, self.absences, steps_are_seen, rank, processes)
        self.staging = staging(plan, self.steps, self.absences, self.rows.trace.aside)
        self._start = start
        self._snapshot_every = snapshot_every
        self._whose: MicroBatch | Unmatched | None = None  # of the last training forward
        self._staged = False  # rows of the batch at hand are with the recorder
        self._scales = {"scale": 1.0, "accumulation": 1.0}  # of a loss whose forward is still to come
        self._pass: MicroBatch | None = None  # between a forward and its backward, as far as it is known
        self._calls = DenoiserCalls()  # of the pass
        self._trained: TrainedSet
        self._presumed = False  # the module whose call began the pass was not known before
        self._reached = False  # the backward under way has reached our models
        self._unfit = ""  # why the backward under way makes no rows: a kind of absence
        self._own_forward = False  # a probe of ours is running
        self._without_backward = 0  # forwards in a row
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
        if not self._own_forward:
            self._handlers[type(event)](event)
            self.staging.throttling.follow(event, self._whose, self.rows)

    @property
    def started(self) -> bool:
        """Whether rows are being logged."""
        return self.recorder is not None

    @property
    def in_pass(self) -> bool:
        """Whether a captured forward waits for its backward."""
        return self._pass is not None

    @property
    def expects_backward(self) -> bool:
        """Whether a backward to come may be of a captured forward, also of one that had its own."""
        return self._pass is not None or self._staged

    @property
    def expects_capture(self) -> bool:
        """Whether the next training forward on the batch at hand may be captured."""
        return self.rows.last is not None and self.steps.captured

    @property
    def knows_timesteps(self) -> bool:
        """Whether the pass under way has seen a module that is told the timesteps by name."""
        return self._pass is not None and (self._pass.timesteps is not None or self._calls.know_timesteps)

    @property
    def in_named_call(self) -> bool:
        """Whether a module that is told them by name is being called."""
        return self._pass is not None and self._calls.in_named_call

    @property
    def knows_prediction(self) -> bool:
        """Whether it has seen that module's prediction as well."""
        if self._pass is None or not self.staging.losses.active:
            return self.knows_timesteps
        return self._calls.know_prediction

    @property
    def uses(self) -> int:
        """How many uses of trained parameters the pass under way has shown so far."""
        return 0 if self._pass is None or self.recorder is None else self.recorder.engine.uses

    def abandon(self) -> None:
        """Give up the pass under way: its rows are left out."""
        found, self._pass = self._pass, None
        self._reached = False
        if found is not None and self.recorder is not None:
            self.recorder.engine.abandon()

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
        staged = self._staged and self.staging.made
        lost = self.recorder.forget_staged() if staged and self.recorder is not None else 1
        self.absences.count(reason, max(lost, 1))

    # ── a batch ───────────────────────────────────────────────────────────────────────────────

    def _batch_received(self, event: events.BatchReceived) -> None:
        self._count_missing_backward()
        if self.started and self.steps.captured and self.rows.unused:
            self.absences.count("no-forward")
            if self.rows.unused == _IN_A_ROW:
                self.absences.tell("no-forward", None, _IN_A_ROW)
        self.abandon()
        self._settle_unseen_step()
        self.steps.settle_lost()
        self._staged = False
        self._scales = {"scale": 1.0, "accumulation": 1.0}
        self.staging.objective.batch_received()
        self.rows.received(event, captured=self.steps.captured, captured_next=self.steps.captured_next)

    def _count_missing_backward(self) -> None:
        """A loss that is not finite is skipped now and then. Where no backward ever comes, that is told."""
        if self._pass is None:
            return
        self._without_backward += 1
        self.absences.count("no-backward")
        if self._without_backward == _IN_A_ROW and not self.staging.passes:
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
        values = timestep_last(event.module, event.args, event.kwargs)
        if self._pass is None:
            self._whose = self.rows.called(values)
            if not isinstance(self._whose, MicroBatch):
                self.steps.unnamed = self.steps.unnamed or self._whose is not _GIVEN_UP
                return
            self.steps.clock.forward_began()
            self._settle_unseen_step()
            if self.steps.closure_captured or not self.steps.captured:
                return
            self._presumed = event.presumed
            self._begin_pass(self._whose, event.module)
        else:
            self._look_again(values)
        if self._pass is not None and self.recorder is not None:
            self.recorder.engine.enter_model(event.module, values)
            self._calls.called(event.module, event.args, event.kwargs)

    def _begin_pass(self, found: MicroBatch, host: nn.Module) -> None:
        if self.recorder is None:
            self.recorder = self._start(found)
            self.steps.follow(self.recorder)
            self._trained = TrainedSet(self.recorder.engine.model, self.recorder.engine.parameters)
        if added := self._trained.added():
            self.give_up()
            names = ", ".join(added[:3]) + (" …" if len(added) > 3 else "")
            self.absences.leave_out("other-parameters", None, len(added), names)
            return
        self._unfit = ""
        self._pass = found.knowing(host=host, **self._scales)
        self._calls = DenoiserCalls(observed=self.staging.objective.observes_of(found.ids))
        self.steps.pass_begins()
        self.recorder.engine.begin()
        self.recorder.engine.tape.paused = True  # until the backward: torch.autograd.grad is none

    def _denoiser_called(self, event: events.DenoiserCalled) -> None:
        if self._pass is not None:
            self._look_again(timestep_last(event.module, event.args, event.kwargs))
            self._calls.called(event.module, event.args, event.kwargs)

    def _look_again(self, values: Iterable[Any]) -> None:
        """A further call before the backward may show whose the rows are, or that they are others'."""
        found = self.rows.shown(values)
        if self._pass is None or not isinstance(found, MicroBatch):
            return
        if not self._pass.shown:
            self._pass = self._pass.knowing(ids=found.ids, images=found.images, shown=True)
        elif not torch.equal(found.ids, self._pass.ids):
            self.give_up()
            self.absences.leave_out("several-batches")

    def _output_seen(self, event: events.OutputSeen) -> None:
        if self._pass is None or self.recorder is None:
            self.rows.resume()
            return
        if event.module is self._pass.host:
            self.rows.resume()
            if not self.uses:
                self.abandon()  # a frozen model, or a copy
                if not self._presumed and self._trained.is_another(event.module):
                    self.absences.leave_out("later-model", None, type(event.module).__name__)
                return
        self.recorder.engine.leave_model(event.module, (), event.output)
        for tensor in events.tensors_of(event.output):
            if tensor.requires_grad:
                tensor.register_hook(partial(self.recorder.engine.tape.guard, self._on_reached))
                break
        self._calls.answered(
            event.module, event.output, self.recorder.engine.tape, self.staging.losses.active
        )

    def _on_reached(self, _: Tensor) -> None:
        if self.steps.in_backward:
            self._reached = True
        elif torch.is_grad_enabled():  # as in torch.autograd.grad(..., create_graph=True) alone
            self._unfit = "double-backward"

    # ── backward ──────────────────────────────────────────────────────────────────────────────

    def _loss_scaled(self, event: events.LossScaled) -> None:
        if self._pass is not None:
            self._pass = self._pass.knowing(scale=event.scale, accumulation=event.accumulation)
        else:
            self._scales = {"scale": event.scale, "accumulation": event.accumulation}

    def _backward_began(self, event: events.BackwardBegan) -> None:
        self.rows.pause()
        self.steps.in_backward, self._reached = True, False
        if self._pass is None or self.recorder is None:
            return
        self.recorder.engine.tape.paused = False
        trained = self.recorder.engine.trained.values()
        if event.only is not None and not {*map(id, trained)} <= {*map(id, event.only)}:
            self._unfit = "partial-backward"
        if event.loss is None:
            self._pass = self._pass.knowing(factor=event.factor)
            return
        factor = unexplained_factor(event.loss, self._pass.scale, self._pass.accumulation)
        self._pass = self._pass.knowing(loss=event.loss, factor=factor)
        if self.staging.losses.active or self._calls.observed:
            self._calls.find_errors(event.loss)

    def _backward_ended(self, event: events.BackwardEnded) -> None:
        try:
            self._pass_ended(event)
        finally:
            self.rows.resume()
            if self.steps.ended_within:
                self.staging.read()
            if self.steps.backward_ended():
                self._after_step()

    def _pass_ended(self, event: events.BackwardEnded) -> None:
        if self._pass is not None and self.recorder is not None:
            self.recorder.engine.tape.paused = True
            if event.failed:
                self.abandon()
                self.absences.count("failed-backward")
            elif self._unfit:
                self.give_up()
                self.absences.leave_out(self._unfit)
            elif self._reached or self.recorder.engine.tape.seconds > 0:
                self._stage(self._pass, self.recorder)
        elif self._reached and self._staged and self.recorder is not None:
            self.absences.tell("several-backwards")
            self.absences.count("several-backwards", self.recorder.forget_staged())

    def _stage(self, found: MicroBatch, recorder: Recorder) -> None:
        """The gradients of a pass are there: its rows wait for the optimiser's step."""
        timesteps = self.staging.timesteps(found, self._calls, recorder)
        if timesteps is None or not found.shown:
            self.give_up()
            if not found.shown:
                self.absences.leave_out(UNSHOWN.kind, UNSHOWN.reason)
            return
        began = self.steps.clock.now()
        engine = recorder.engine
        engine.loss_scale = found.loss_scale
        try:
            engine.finish()
        except RecheckNeeded as again:
            self.absences.leave_out(f"recheck-{again.law}", "%s", again)
            return
        finally:
            self.abandon()
        if not self.staging.stage(found, timesteps, self._calls, recorder):
            self.give_up()
            return
        self._staged = True
        self._without_backward = 0
        seconds = self.steps.clock.now() - began + engine.hook_seconds
        self.steps.pass_ended(self.staging.samples(found, recorder), seconds)

    # ── an optimiser step ─────────────────────────────────────────────────────────────────────

    def _step_began(self, event: events.StepBegan) -> None:
        if not event.closure:
            self.rows.pause()
        self.steps.began()

    def _step_ended(self, event: events.StepEnded) -> None:
        self.rows.stepped()
        captured = self.recorder is None or self.steps.captured
        if self.steps.unnamed and not self.steps.samples and captured and not self.steps.in_backward:
            self.absences.leave_out_unnamed(self._whose)
        if self.steps.ended(event):
            self._after_step()

    def _after_step(self) -> None:
        if self._snapshot_every and self.steps.count % self._snapshot_every == 0:
            self._snapshot()

    def _settle_unseen_step(self) -> None:
        if self.steps.settle_unseen():
            self._after_step()

    def settle_held(self) -> None:
        """Complete rows need not wait for the next call of the model: a checkpoint or the end comes first."""
        self.staging.read()
        if self.recorder is not None:
            self.steps.check_restored(self.recorder)

    def _snapshot_due(self) -> None:
        self.settle_held()
        self._snapshot()

    def _snapshot(self) -> None:
        if self.recorder is not None:
            self._aside(self.recorder.snapshot, self.steps.count)

    def probe_at_end(self, budget: float) -> None:
        """Probe all samples after the last step, as well as so many seconds allow."""
        if self.recorder is not None:
            self._aside(self.recorder.probe_at_end, self.steps.count, budget, self.steps.processes)

    def _aside(self, measure: Callable[..., None], *args: Any) -> None:
        """Forwards of ours are none of the training's, nor is the time that they take."""
        self._own_forward = True
        try:
            measure(*args)
        finally:
            self._own_forward = False
            self.steps.clock.restart()
