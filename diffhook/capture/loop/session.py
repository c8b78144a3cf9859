"""Follows one process's training loop from event to event, and feeds the recorder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from diffhook.capture import Plan, Recorder
from diffhook.capture.appearance import appearance, images_of
from diffhook.capture.diffusion import predicted_tensor
from diffhook.capture.loop import events
from diffhook.capture.loop.absences import Absences
from diffhook.capture.loop.call_inspection import find_timesteps, timestep_last
from diffhook.capture.loop.fetch_order import FetchOrder
from diffhook.capture.loop.identity import RowIds, Unmatched, blocks
from diffhook.capture.loop.loss_reader import LossReader
from diffhook.capture.loop.losses import PredictionGradient, unexplained_factor
from diffhook.capture.loop.micro_batch import MicroBatch
from diffhook.capture.loop.scalars import Scalars
from diffhook.capture.loop.steps import Steps
from diffhook.capture.loop.thumbnails import ThumbnailTaker
from diffhook.errors import CaptureError, ConfigurationError, RecheckNeeded

_NO_BACKWARD = 3  # forwards after which it is told
_STAGED_ROWS = 1 << 16  # without a step in between
_GIVEN_UP = Unmatched("given-up", "the rest of the batch is left out with what was left out of it")


class Session:
    """One process's loop: :meth:`on` takes its events in the order of :mod:`diffhook.capture.loop.events`.

    Args:
        plan: which steps to capture.
        start: makes the recorder at the first training forward, given that micro-batch.
        steps_are_seen: whether an optimiser of the trained parameters is known.
        snapshot_every: optimiser steps between snapshots.
        reduction: how the loop's loss joins the rows of a batch, "mean" or "sum".
        rank, processes: this process's number, and how many share the batch.
        thumbnails: longest side of those to keep; 0: none.
    """

    def __init__(
        self,
        plan: Plan,
        start: Callable[[MicroBatch], Recorder],
        steps_are_seen: Callable[[], bool],
        *,
        snapshot_every: int | None = None,
        reduction: str = "mean",
        rank: int = 0,
        processes: int = 1,
        thumbnails: int = 0,
    ) -> None:
        self.plan = plan
        self.recorder: Recorder | None = None
        self.absences = Absences()
        self.scalars = Scalars()
        self.fetched = FetchOrder()
        self.captured_passes = 0
        self.steps = Steps(plan, self.absences, steps_are_seen, rank, processes)
        self._start = start
        self._snapshot_every = snapshot_every
        self._losses = LossReader(reduction)
        self._thumbnails = ThumbnailTaker(thumbnails)
        self._received: MicroBatch | Unmatched | None = None  # as it came
        self._staged = False  # its rows are with the recorder
        self._pass: MicroBatch | None = None  # between a forward and its backward, as far as it is known
        self._reached = False  # the backward under way has reached our models
        self._differentiated = False  # a gradient of the pass is part of its loss, as in a gradient penalty
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
            events.StepBegan: lambda _: self.steps.began(),
            events.StepEnded: self._step_ended,
            events.GradientsZeroed: lambda _: self.steps.zeroed(),
            events.SnapshotDue: lambda _: self._snapshot(),
        }

    def on(self, event: events.Event) -> None:
        """Take the next event."""
        if not self._own_forward:
            self._handlers[type(event)](event)

    @property
    def started(self) -> bool:
        """Whether rows are being logged."""
        return self.recorder is not None

    @property
    def in_pass(self) -> bool:
        """Whether a captured forward waits for its backward."""
        return self._pass is not None

    @property
    def expects_capture(self) -> bool:
        """Whether the next training forward on the batch at hand would be captured."""
        return isinstance(self._received, MicroBatch) and self.steps.captured

    @property
    def knows_timesteps(self) -> bool:
        """Whether the pass under way has seen a module that is told the timesteps by name."""
        return self._pass is not None and self._pass.timesteps is not None and not self._pass.guessed

    @property
    def knows_prediction(self) -> bool:
        """Whether it has seen that module's prediction as well."""
        return self.knows_timesteps and (not self._losses.active or self._pass.prediction is not None)  # type: ignore[union-attr]

    @property
    def touched(self) -> bool:
        """Whether the pass under way has called a layer with trained parameters."""
        return self._pass is not None and self.recorder is not None and bool(self.recorder.engine.tape.calls)

    def abandon(self) -> None:
        """Give up the pass under way: its rows are left out."""
        if self._pass is not None and self.recorder is not None:
            self._pass = None
            self.recorder.engine.abandon()
        self._pass = None
        self._reached = False

    def give_up(self) -> None:
        """Leave the batch at hand out. Its layers must not be hooked anew before the backward, in which
        checkpointed blocks save what they saved."""
        self.abandon()
        self._received = _GIVEN_UP

    def failed(self, reason: str) -> None:
        """An error of ours costs the batch at hand; once that is staged, what was captured for its step."""
        self.steps.end_missed = self.steps.inside
        self.give_up()
        lost = self.recorder.forget_staged() if self._staged and self.recorder is not None else 1
        self.absences.count(reason, max(lost, 1))

    # ── a batch ───────────────────────────────────────────────────────────────────────────────

    def _batch_received(self, event: events.BatchReceived) -> None:
        self._count_missing_backward()
        self.abandon()
        self._settle_unseen_step()
        self.steps.settle_lost()
        self._staged = False
        self.fetched.received(event.source, event.batch)
        if isinstance(event.ids, RowIds):
            images = None if event.batch is None else images_of(event.batch)
            self._received = MicroBatch(
                event.ids.ids, images, timesteps=event.timesteps, named=event.timesteps is not None
            )
        else:
            self._received = event.ids

    def _count_missing_backward(self) -> None:
        """A loss that is not finite is skipped now and then. Where no backward ever comes, that is told."""
        if self._pass is None:
            return
        self._without_backward += 1
        self.absences.count("no-backward")
        if self._without_backward == _NO_BACKWARD and not self.captured_passes:
            self.absences.tell(
                "no-backward",
                "no backward of a loss came after %d forwards: what torch.autograd.grad returns cannot be "
                "split by sample; call loss.backward() or accelerator.backward(loss)",
                _NO_BACKWARD,
            )

    def _loader_ended(self, event: events.LoaderEnded) -> None:
        self._count_missing_backward()
        self.abandon()
        self._settle_unseen_step()
        self.fetched.ended(event.source)
        self._received = None

    # ── forward ───────────────────────────────────────────────────────────────────────────────

    def _forward_began(self, event: events.ForwardBegan) -> None:
        doubt = self.fetched.used()
        if not event.training:
            return
        if doubt is not None:
            self._received = doubt
        if not isinstance(self._received, MicroBatch):
            self.steps.unnamed = True
            return
        self.steps.clock.forward_began()
        if self.steps.closure_captured or not self.steps.captured:
            return
        if self.recorder is None:
            self.recorder = self._start(self._received)
            self.steps.follow(self.recorder)
        if self._pass is None:
            self._differentiated = False
            self._pass = self._received.knowing(host=event.module)
            self.steps.pass_begins()
            self.recorder.engine.begin()
            self.recorder.engine.tape.paused = True  # until the backward: torch.autograd.grad is none
        self.recorder.engine.enter_model(event.module, timestep_last(event.module, event.args, event.kwargs))
        self._note_timesteps(event.module, event.args, event.kwargs)

    def _denoiser_called(self, event: events.DenoiserCalled) -> None:
        if self._pass is not None:
            self._note_timesteps(event.module, event.args, event.kwargs)

    def _note_timesteps(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        found = self._pass
        assert found is not None
        if found.denoiser is not None and not found.guessed:
            self._compare_timesteps(found, module, args, kwargs)
            return
        if found.named:
            self._pass = found.knowing(denoiser=module)
        else:
            told = find_timesteps(module, args, kwargs)
            if told is None or (found.timesteps is not None and not told.by_name):
                return
            self._pass = found.knowing(
                timesteps=self._in_schedulers_units(told.values),
                guessed=not told.by_name,
                denoiser=module,
                prediction=None,
            )
        assert self._pass.timesteps is not None
        rows, count = len(self._pass.timesteps), len(self._pass.ids)
        if rows not in (1, count) and count != 1 and not self._pass.guessed:
            self._leave_out(rows, count)

    def _compare_timesteps(
        self, found: MicroBatch, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        """A row has one timestep: of a denoiser that is called twice, both calls must be at the same."""
        if found.named or module is not found.denoiser or found.timesteps is None:
            return
        told = find_timesteps(module, args, kwargs)
        if told is not None and not torch.equal(self._in_schedulers_units(told.values), found.timesteps):
            self.give_up()
            self.absences.leave_out(
                "several-timesteps",
                "the denoiser was called at two timesteps before one backward, and a row has one: such "
                "micro-batches are left out. Call a backward for each, or name one: hook.step(timesteps=...)",
            )

    def _in_schedulers_units(self, timesteps: Tensor) -> Tensor:
        """Of what the model is told, where the objective says by which factor that differs."""
        objective = None if self.recorder is None else self.recorder.objective
        scale = float(getattr(objective, "timestep_scale", 1.0))
        return timesteps if scale == 1 else timesteps.float() / scale

    def _leave_out(self, rows: int, count: int) -> None:
        """The model sees another number of rows than there are ids: wrong rows would be worse than none."""
        self.give_up()
        if rows % count:
            self.absences.leave_out(
                "other-rows",
                "the batch has %d sample ids, but the model was called on %d rows, and it is not known which "
                "rows are whose: such steps are not captured. Name the rows with "
                "hook.step(sample_ids=..., timesteps=...)",
                count,
                rows,
            )
            return
        self.absences.leave_out(
            "several-rows",
            "the model was called on %d rows for %d sample ids, and it is not known which rows are whose: "
            "such steps are not captured. Name every row with hook.step(sample_ids=...): "
            "ids.repeat_interleave(%d) where a sample's rows follow one another, ids.repeat(%d) where whole "
            "batches do",
            rows,
            count,
            rows // count,
            rows // count,
        )

    def _output_seen(self, event: events.OutputSeen) -> None:
        if self._pass is None or self.recorder is None:
            return
        if event.module is self._pass.host and not self.touched:
            self.abandon()  # a frozen model, or a copy
            return
        self.recorder.engine.leave_model(event.module, (), event.output)
        for tensor in events.tensors_of(event.output):
            if tensor.requires_grad:
                tensor.register_hook(partial(self.recorder.engine.tape.guard, self._on_reached))
                break
        if event.module is self._pass.denoiser and self._pass.prediction is None and self._losses.active:
            with suppress(ConfigurationError):  # a model of another kind: losses stay unknown
                predicted = predicted_tensor(event.output)
                if predicted.dim() > 1 and predicted.requires_grad:
                    reader = PredictionGradient(predicted, self.recorder.engine.tape)
                    self._pass = self._pass.knowing(prediction=reader)

    def _on_reached(self, _: Tensor) -> None:
        if self.steps.in_backward:
            self._reached = True
        elif torch.is_grad_enabled():  # as in torch.autograd.grad(..., create_graph=True) alone
            self._differentiated = True

    # ── backward ──────────────────────────────────────────────────────────────────────────────

    def _loss_scaled(self, event: events.LossScaled) -> None:
        if self._pass is not None:
            self._pass = self._pass.knowing(scale=event.scale, accumulation=event.accumulation)
        elif isinstance(self._received, MicroBatch):
            self._received = self._received.knowing(scale=event.scale, accumulation=event.accumulation)

    def _backward_began(self, event: events.BackwardBegan) -> None:
        self.steps.in_backward, self._reached = True, False
        if self._pass is None or self.recorder is None:
            return
        self.recorder.engine.tape.paused = False
        if event.loss is None:
            return
        factor = unexplained_factor(event.loss, self._pass.scale, self._pass.accumulation)
        self._pass = self._pass.knowing(loss=event.loss, factor=factor)
        if self._pass.prediction is not None and self._losses.active:
            self._pass.prediction.find_errors(event.loss)

    def _backward_ended(self, event: events.BackwardEnded) -> None:
        try:
            self._pass_ended(event)
        finally:
            if self.steps.backward_ended():
                self._after_step()

    def _pass_ended(self, event: events.BackwardEnded) -> None:
        if self._pass is not None and self.recorder is not None:
            self.recorder.engine.tape.paused = True
            if event.failed:
                self.abandon()
                self.absences.count("failed-backward")
            elif self._differentiated:
                self.give_up()
                self.absences.leave_out(
                    "double-backward",
                    "the loss depends on a gradient of the model (a gradient penalty), which cannot be split "
                    "by sample: such micro-batches are left out",
                )
            elif self._reached or self.recorder.engine.tape.seconds > 0:
                self._stage(self._pass, self.recorder)

    def _stage(self, found: MicroBatch, recorder: Recorder) -> None:
        """The gradients of a pass are there: its rows wait for the optimiser's step."""
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
        if found.timesteps is None:
            raise CaptureError(
                "what is trained was called without a timestep (keyword 'timestep' or second argument): name "
                "it with hook.step(sample_ids=..., timesteps=...), as where another model is trained through "
                "a frozen denoiser (textual inversion)"
            )
        rows = len(engine.norms)
        for count in (len(found.ids), len(found.timesteps)):
            if count not in (1, rows):
                self._leave_out(rows, count)
                return
        if recorder.staged_rows + rows > _STAGED_ROWS:
            self.absences.leave_out(
                "no-step",
                "no optimiser step was seen for %d rows: further rows are left out until there is one",
                recorder.staged_rows,
            )
            return
        found = found.knowing(ids=found.ids.expand(rows), timesteps=found.timesteps.expand(rows))
        reading, mean_of = self._losses.read(found, engine)
        looks = None
        if found.images is not None and len(found.images) == rows:
            looks = appearance(found.images)
            self._thumbnails.take(recorder.writer, found.ids, found.images)
        coefficient = found.accumulation * found.factor / (mean_of * self.steps.processes)
        assert found.timesteps is not None
        recorder.captured(
            found.ids,
            found.timesteps,
            step=self.steps.count,
            weight=coefficient * self.plan.stride,
            losses=reading.losses,
            appearance=looks,
        )
        self._staged = True
        self.scalars.add(engine.norms)
        self.captured_passes += 1
        self._without_backward = 0
        seconds = self.steps.clock.now() - began + engine.hook_seconds
        self.steps.pass_ended(rows // blocks(found.ids), seconds)

    # ── an optimiser step ─────────────────────────────────────────────────────────────────────

    def _step_ended(self, event: events.StepEnded) -> None:
        captured = self.recorder is None or self.steps.captured
        if self.steps.unnamed and not self.steps.samples and captured and not self.steps.in_backward:
            self._tell_unnamed()
        if self.steps.ended(event):
            self._after_step()

    def _after_step(self) -> None:
        if self._snapshot_every and self.steps.count % self._snapshot_every == 0:
            self._snapshot()

    def _settle_unseen_step(self) -> None:
        if self.steps.settle_unseen():
            self._after_step()

    def _tell_unnamed(self) -> None:
        found = self._received
        if found is _GIVEN_UP:  # told already
            return
        if isinstance(found, Unmatched):
            self.absences.leave_out(found.kind, "such micro-batches are left out: %s", found.reason)
        else:
            self.absences.leave_out(
                "no-batch",
                "the model was trained on a batch that no prepared loader had just given, and it is not "
                "known whose rows it has: such steps are not captured. Name the samples with "
                "hook.step(sample_ids=...)",
            )

    def _snapshot(self) -> None:
        if self.recorder is None:
            return
        self._own_forward = True
        try:
            self.recorder.snapshot(self.steps.count)
        finally:
            self._own_forward = False
            self.steps.clock.restart()
