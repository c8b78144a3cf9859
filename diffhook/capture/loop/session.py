"""Follows one process's training loop from event to event, and feeds the recorder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
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
from diffhook.capture.loop.losses import PredictionGradient, Reading
from diffhook.capture.loop.micro_batch import MicroBatch
from diffhook.capture.loop.optimizers import learning_rates
from diffhook.capture.loop.parameter_moves import ParameterMoves
from diffhook.capture.loop.restored import RestoredParameters
from diffhook.capture.loop.scalars import Scalars
from diffhook.capture.loop.step_clock import StepClock
from diffhook.capture.loop.thumbnails import ThumbnailTaker
from diffhook.console import announce
from diffhook.errors import CaptureError, ConfigurationError, RecheckNeeded
from diffhook.log.samples import ROLE

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
        self.rank, self.processes = rank, processes
        self.recorder: Recorder | None = None
        self.absences = Absences()
        self.scalars = Scalars()
        self.fetched = FetchOrder()
        self.step_count = 0  #: optimiser steps taken
        self.captured_passes = 0
        self._start = start
        self._steps_are_seen = steps_are_seen
        self._moves: ParameterMoves | None = None
        self._snapshot_every = snapshot_every
        self._reduction = reduction
        self._thumbnails = ThumbnailTaker(thumbnails)
        self._clock = StepClock(plan)
        self._received: MicroBatch | Unmatched | None = None  # as it came
        self._pass: MicroBatch | None = None  # between a forward and its backward, as far as it is known
        self._reached = False  # the backward under way has reached our models
        self._restored: RestoredParameters | None = None
        self._own_forward = False  # a probe of ours is running
        self._reads_losses = True  # until a loss is seen to be no mean of squared errors
        self._reads_factors = True  # until one is seen that is part of the loss
        self._samples = 0  # of the step that were captured
        self._in_step = self._in_backward = False
        self._closure_captured = False  # the step's closure may be called again
        self._step_due: events.StepEnded | None = None  # taken inside the backward
        self._unnamed = False  # a model was trained on something that is not known, in this step
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
            events.GradientsZeroed: self._gradients_zeroed,
            events.SnapshotDue: lambda _: self._snapshot(),
        }

    def on(self, event: events.Event) -> None:
        """Take the next event."""
        if not self._own_forward:
            self._handlers[type(event)](event)

    @property
    def in_pass(self) -> bool:
        """Whether a captured forward waits for its backward."""
        return self._pass is not None

    @property
    def expects_capture(self) -> bool:
        """Whether the next training forward on the batch at hand would be captured."""
        return isinstance(self._received, MicroBatch) and self.plan.captures(self.step_count)

    @property
    def knows_timesteps(self) -> bool:
        """Whether the pass under way has seen a module that is told the timesteps by name."""
        return self._pass is not None and self._pass.timesteps is not None and not self._pass.guessed

    @property
    def knows_prediction(self) -> bool:
        """Whether it has seen that module's prediction as well."""
        return self.knows_timesteps and (not self._reads_losses or self._pass.prediction is not None)  # type: ignore[union-attr]

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
        """Leave the batch at hand out. Layers that a forward has seen must not be hooked anew before its
        backward, in which checkpointed blocks save what they saved."""
        self.abandon()
        self._received = _GIVEN_UP

    # ── a batch ───────────────────────────────────────────────────────────────────────────────

    def _batch_received(self, event: events.BatchReceived) -> None:
        self.abandon()
        self._settle_unseen_step()
        self._in_step = self._closure_captured = False
        self.fetched.received(event.source, event.batch)
        if isinstance(event.ids, RowIds):
            images = None if event.batch is None else images_of(event.batch)
            self._received = MicroBatch(
                event.ids.ids, images, timesteps=event.timesteps, named=event.timesteps is not None
            )
        else:
            self._received = event.ids

    def _loader_ended(self, event: events.LoaderEnded) -> None:
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
            self._unnamed = True
            return
        self._clock.forward_began()
        if self._closure_captured or not self.plan.captures(self.step_count):
            return
        if self.recorder is None:
            self.recorder = self._start(self._received)
            self._restored = RestoredParameters(self.recorder.engine.model)
        self._check_restored()
        if self._pass is None:
            self._pass = self._received.knowing(host=event.module)
            self._note_parameters(self.recorder)
            self.recorder.engine.begin()
            self.recorder.engine.tape.paused = True  # until the backward: torch.autograd.grad is none
        self.recorder.engine.enter_model(event.module, timestep_last(event.module, event.args, event.kwargs))
        self._note_timesteps(event.module, event.args, event.kwargs)

    def _note_parameters(self, recorder: Recorder) -> None:
        """Before the first pass of a step, where nobody tells of steps."""
        if not self._steps_are_seen() and not recorder.staged_rows:
            if self._moves is None:
                self._moves = ParameterMoves(recorder.engine.parameters.values())
            self._moves.note()

    def _denoiser_called(self, event: events.DenoiserCalled) -> None:
        if self._pass is not None:
            self._note_timesteps(event.module, event.args, event.kwargs)

    def _note_timesteps(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        found = self._pass
        assert found is not None
        if found.denoiser is not None and not found.guessed:
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
                tensor.register_hook(self._on_reached)
                break
        if event.module is self._pass.denoiser and self._pass.prediction is None and self._reads_losses:
            with suppress(ConfigurationError):  # a model of another kind: losses stay unknown
                predicted = predicted_tensor(event.output)
                if predicted.dim() > 1 and predicted.requires_grad:
                    reader = PredictionGradient(predicted, self.recorder.engine.tape)
                    self._pass = self._pass.knowing(prediction=reader)

    def _on_reached(self, _: Tensor) -> None:
        if self._in_backward:
            self._reached = True

    # ── backward ──────────────────────────────────────────────────────────────────────────────

    def _loss_scaled(self, event: events.LossScaled) -> None:
        if self._pass is not None:
            self._pass = self._pass.knowing(scale=event.scale, accumulation=event.accumulation)
        elif isinstance(self._received, MicroBatch):
            self._received = self._received.knowing(scale=event.scale, accumulation=event.accumulation)

    def _backward_began(self, event: events.BackwardBegan) -> None:
        self._in_backward, self._reached = True, False
        if self._pass is None or self.recorder is None:
            return
        self.recorder.engine.tape.paused = False
        self._pass = self._pass.knowing(loss=event.loss)
        if event.loss is not None and self._pass.prediction is not None and self._reads_losses:
            self._pass.prediction.find_errors(event.loss)

    def _backward_ended(self, event: events.BackwardEnded) -> None:
        self._in_backward = False
        if self._pass is not None and self.recorder is not None:
            self.recorder.engine.tape.paused = True
            if event.failed:
                self.abandon()
            elif self._reached or self.recorder.engine.tape.seconds > 0:
                self._stage(self._pass, self.recorder)
        if self._step_due is not None:
            due, self._step_due = self._step_due, None
            self._step_ended(due)

    def _stage(self, found: MicroBatch, recorder: Recorder) -> None:
        """The gradients of a pass are there: its rows wait for the optimiser's step."""
        began = self._clock.now()
        engine = recorder.engine
        engine.loss_scale = found.scale * found.accumulation
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
        reading, mean_of = self._read_losses(found, recorder)
        looks = None
        if found.images is not None and len(found.images) == rows:
            looks = appearance(found.images)
            self._thumbnails.take(recorder.writer, found.ids, found.images)
        coefficient = found.accumulation * reading.factor / (mean_of * self.processes)
        assert found.timesteps is not None
        recorder.captured(
            found.ids,
            found.timesteps,
            step=self.step_count,
            weight=coefficient * self.plan.stride,
            losses=reading.losses,
            appearance=looks,
        )
        self.scalars.add(engine.norms)
        self.captured_passes += 1
        self._samples += rows // blocks(found.ids)
        self._closure_captured = self._in_step
        self._clock.captured(self._clock.now() - began + engine.hook_seconds)

    def _read_losses(self, found: MicroBatch, recorder: Recorder) -> tuple[Reading, int]:
        """The rows' own losses as far as they are known, and over how many rows the loop takes a mean."""
        engine, rows, parts = recorder.engine, len(found.ids), blocks(found.ids)
        loss = None if found.loss is None else float(found.loss.detach()) / (found.scale * found.accumulation)
        mean_of = rows if self._reduction == "mean" else 1
        with_classes = parts > 1 and bool((found.ids >= ROLE).any())
        reading = Reading(None)
        if not with_classes:
            reading = self._read(found, mean_of / engine.loss_scale, loss, rows // mean_of)
        if parts > 1 and mean_of > 1 and (reading.losses is None or reading.factor != 1):
            # Prior preservation adds the means of both halves; other loops may as well.
            scale = engine.loss_scale * parts
            halves = self._read(found, rows / scale, loss, parts)
            if with_classes or halves.losses is not None:
                reading, mean_of = halves, rows // parts
                engine.loss_scale = scale
        if reading.contradicted:
            self._reads_losses = False  # another kind of loss agrees by chance now and then
        if reading.factor != 1:
            engine.loss_scale *= reading.factor
        return reading, mean_of

    def _read(self, found: MicroBatch, undo: float, loss: float | None, parts: int) -> Reading:
        if found.prediction is None or not self._reads_losses:
            return Reading(None)
        reading = found.prediction.read(undo, loss, parts)
        return reading if self._reads_factors or reading.factor == 1 else Reading(None)

    # ── an optimiser step ─────────────────────────────────────────────────────────────────────

    def _gradients_zeroed(self, _: events.GradientsZeroed) -> None:
        if not self._in_step and not self._in_backward:
            self._moved_nothing()
        elif self._closure_captured:
            self.absences.tell(
                "closure",
                "the optimiser calls its closure again: rows hold the gradients of the first call in a step",
            )

    def _moved_nothing(self) -> None:
        """Gradients were zeroed without a step, or not finite."""
        self._samples = 0
        if self.recorder is not None:
            self.recorder.skipped()

    def _settle_unseen_step(self) -> None:
        """A step may have been taken by nobody that is known: then the parameters have changed."""
        if self.recorder is None or not self.recorder.staged_rows:
            return
        if self._moves is not None and not self._steps_are_seen() and self._moves.moved():
            self.absences.tell(
                "unseen-step",
                "the parameters change without a step of an optimiser that is known: the log counts each "
                "change as a step of learning rate 1",
            )
            self._step_ended(events.StepEnded())
        elif all(parameter.grad is None for parameter in self.recorder.engine.parameters.values()):
            self._moved_nothing()

    def _step_began(self, event: events.StepBegan) -> None:
        self._in_step = True
        if self._restored is not None and not self._in_backward:
            self._restored.step_began()

    def _step_ended(self, event: events.StepEnded) -> None:
        if self._in_backward:  # steps that are fused into it, parameter by parameter: one
            self._step_due = event
            return
        self._in_step = self._closure_captured = False
        if event.overflowed:
            self._moved_nothing()
            return
        recorder = self.recorder
        if self._unnamed and not self._samples and (recorder is None or self.plan.captures(self.step_count)):
            self._tell_unnamed()
        self._unnamed = False
        if recorder is None:
            return
        began = self._clock.now()
        if self._restored is not None:
            self._restored.step_ended()
        recorder.stepped(
            self._rate(event.optimizer),
            self._samples * self.processes,
            hold=self._restored is not None and not self._restored.settled,
        )
        self.step_count += 1
        self._samples = 0
        if self._clock.finish_step(began):
            self._tell_stride()
        if self._snapshot_every and self.step_count % self._snapshot_every == 0:
            self._snapshot()

    def _check_restored(self) -> None:
        """Rows of steps whose parameters the loop put back held what it threw away."""
        if self._restored is None or self.recorder is None or self._restored.settled:
            return
        masks = self._restored.called()
        if not masks:
            self.recorder.release_held()
            return
        self.recorder.forget_held()
        self.recorder.engine.preconditioner = masks
        self.absences.leave_out(
            "restored-parameters",
            "the loop puts most rows of %s back after each step (textual inversion): norms and projections "
            "are of the rows that it keeps. The step that showed it is left out",
            ", ".join(masks),
        )

    def _tell_unnamed(self) -> None:
        found = self._received
        if found is _GIVEN_UP:  # told already
            return
        if isinstance(found, Unmatched):
            self.absences.leave_out(found.kind, "%s", found.reason)
        else:
            self.absences.leave_out(
                "no-batch",
                "the model was trained on a batch that no prepared loader had just given, and it is not "
                "known whose rows it has: such steps are not captured. Name the samples with "
                "hook.step(sample_ids=...)",
            )

    def _rate(self, optimizer: torch.optim.Optimizer | None) -> float:
        rates = [] if optimizer is None else learning_rates(optimizer)
        if optimizer is not None and not rates:
            self.absences.tell(
                "no-rate",
                "%s has no learning rate of its own (lr is None): the log counts each step with rate 1",
                type(optimizer).__name__,
            )
        if len(set(rates)) > 1:
            self.absences.tell(
                "several-rates",
                "the optimiser's groups have several learning rates (%s): the log, and the scores that go by "
                "it, take the first group's, %g, for all parameters",
                ", ".join(f"{rate:g}" for rate in sorted(set(rates))),
                rates[0],
            )
        return rates[0] if rates else 1.0

    def _tell_stride(self) -> None:
        if self.rank == 0:
            announce(
                f"diffhook: capturing one step in {self.plan.stride} to stay within "
                f"{self.plan.overhead:.0%} overhead"
            )

    def _snapshot(self) -> None:
        if self.recorder is None:
            return
        self._own_forward = True
        try:
            self.recorder.snapshot(self.step_count)
        finally:
            self._own_forward = False
            self._clock.restart()
