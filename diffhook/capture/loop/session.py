"""What happens between a batch and the optimiser step, as a hook sees it.

batch → forward → backward → (more micro-batches) → optimiser step
ids     begin     rows staged                       rows complete, written
"""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from diffhook.capture import Plan, Recorder
from diffhook.capture.appearance import appearance, images_of
from diffhook.capture.diffusion import predicted_tensor
from diffhook.capture.loop.call_inspection import SampleLosses, find_timesteps, learning_rates, timestep_last
from diffhook.capture.loop.identity import blocks
from diffhook.capture.loop.scalars import Scalars
from diffhook.capture.loop.thumbnails import ThumbnailTaker
from diffhook.errors import CaptureError, ConfigurationError, RecheckNeeded
from diffhook.log.samples import ROLE

logger = logging.getLogger("diffhook")


class Session:
    """Follows one process's training loop and feeds the recorder.

    Args:
        plan: which steps to capture.
        snapshot_every: optimiser steps between snapshots.
        rank, processes: this process's number, and how many share the batch.
        thumbnails: longest side of those to keep; 0: none.
    """

    def __init__(
        self,
        plan: Plan,
        snapshot_every: int | None,
        *,
        rank: int = 0,
        processes: int = 1,
        thumbnails: int = 0,
    ) -> None:
        self.plan = plan
        self.rank = rank
        self.processes = processes
        self.recorder: Recorder | None = None
        self.scalars = Scalars()
        self.thumbnails = ThumbnailTaker(thumbnails)
        self.step_count = 0  # optimiser steps taken
        self.began = time.perf_counter()
        self.sample_ids: Tensor | None = None
        self.timesteps: Tensor | None = None
        self.in_pass = False  # a forward was watched whose backward has not come
        self.in_step = False  # the optimiser is at work, and calls a closure perhaps
        self._snapshot_every = snapshot_every
        self._own_forward = False  # a probe of ours is running
        self._batch_captured = False
        self._warned: set[str] = set()
        self._denoiser: nn.Module | None = None  # of the pass: the model that knows the timesteps
        self._losses: SampleLosses | None = None
        self._reads_losses = True  # off gradients, until a loss is seen to be no mean of squared errors
        self._images: Tensor | None = None  # of the batch
        self._step_began: float | None = None
        self._reset_step()

    def _reset_step(self) -> None:
        self._step_seconds = 0.0  # of capture
        self._step_samples = 0
        self._step_captured = False

    # ── a micro-batch ─────────────────────────────────────────────────────────────────────────

    def batch(self, sample_ids: Tensor | None, timesteps: Tensor | None = None, batch: Any = None) -> None:
        """The loop has received ``batch``, or (None) is through with its loader."""
        self.abandon()
        self.sample_ids, self.timesteps = sample_ids, timesteps
        self._images = None if batch is None else images_of(batch)
        self._batch_captured = self.in_step = False

    def abandon(self) -> None:
        """Forget a forward whose backward did not come."""
        if self.in_pass and self.recorder is not None:
            self.recorder.engine.abandon()
        self.in_pass = False
        self.sample_ids = self.timesteps = self._images = self._losses = self._denoiser = None

    def expects(self) -> bool:
        """Whether a forward now would be one of training, on a batch that is known."""
        return self.sample_ids is not None and not self._own_forward and torch.is_grad_enabled()

    def forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """One of the models is about to be called on the batch."""
        recorder = self.recorder
        assert recorder is not None
        if self._step_began is None:
            self._step_began = time.perf_counter()
        if not self.in_pass:
            if not self.plan.captures(self.step_count):
                return
            self.in_pass = True
            recorder.engine.begin()
        recorder.engine.enter_model(model, timestep_last(model, args, kwargs))
        if self._denoiser is None:
            self._note_timesteps(model, args, kwargs)

    def through(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The loss is computed through a model that is not trained, but told the timesteps."""
        if self.in_pass and self.timesteps is None:
            self._note_timesteps(model, args, kwargs)

    def _note_timesteps(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.timesteps is None:
            self.timesteps = self._in_schedulers_units(find_timesteps(model, args, kwargs))
        if self.timesteps is not None:
            self._denoiser = model
        assert self.sample_ids is not None
        count = len(self.sample_ids)
        told = count if self.timesteps is None else len(self.timesteps)
        if told in (1, count) or count == 1:
            return
        if told % count == 0:
            self._leave_out(told, count)
            return
        raise CaptureError(
            f"the batch has {count} sample ids but {told} timesteps: name both "
            "with hook.step(sample_ids=..., timesteps=...)"
        )

    def _in_schedulers_units(self, timesteps: Tensor | None) -> Tensor | None:
        """Of what the model is told, where the objective says by which factor that differs."""
        objective = None if self.recorder is None else self.recorder.objective
        scale = float(getattr(objective, "timestep_scale", 1.0))
        return timesteps if timesteps is None or scale == 1 else timesteps.float() / scale

    def _leave_out(self, rows: int, count: int) -> None:
        """The batch has several rows of each sample: rows under wrong ids would be worse than none."""
        self.abandon()
        self.warn_once(
            "the model was called on %d rows for %d sample ids, and it is not known which rows are whose: "
            "such steps are not captured. Name every row with hook.step(sample_ids=...): "
            "ids.repeat_interleave(%d) where a sample's rows follow one another, ids.repeat(%d) where whole "
            "batches do",
            rows,
            count,
            rows // count,
            rows // count,
        )

    def output(self, model: nn.Module, output: Any) -> None:
        """A model has answered."""
        wanted = self.in_pass and self._reads_losses and self._losses is None
        if self.recorder is None or not wanted or model is not self._denoiser:
            return
        with suppress(ConfigurationError):  # a model of another kind: losses stay unknown
            predicted = predicted_tensor(output)
            if predicted.dim() > 1 and predicted.requires_grad:
                self._losses = SampleLosses(predicted, self.recorder.engine.tape)

    def backward(self, batch_loss: float | None, scale: float, accumulation: float) -> None:
        """The backward is over: stage the rows.

        Args:
            batch_loss: the loop's loss, before scales; None if not known.
            scale: factor on the loss that the optimiser step undoes (AMP).
            accumulation: factor on the loss that it does not (1 / micro-batches of a step).
        """
        recorder, ids, timesteps, losses = self.recorder, self.sample_ids, self.timesteps, self._losses
        images = self._images
        if not self.in_pass or recorder is None or ids is None:
            self._warn_of_second_backward()
            return
        began = time.perf_counter()
        engine = recorder.engine
        engine.loss_scale = scale * accumulation
        try:
            engine.finish()
        except RecheckNeeded as again:
            self.warn_once(str(again))
            return
        finally:
            self.abandon()
        if timesteps is None:
            raise CaptureError(
                "what is trained was called without a timestep (keyword 'timestep' or second argument): name "
                "it with hook.step(sample_ids=..., timesteps=...), as where another model is trained through "
                "a frozen denoiser (textual inversion)"
            )
        rows = len(engine.norms)
        if len(ids) not in (1, rows) and rows % len(ids) == 0:
            self._leave_out(rows, len(ids))
            return
        if len(ids) not in (1, rows) or len(timesteps) not in (1, rows):
            raise CaptureError(
                f"the model was called on {rows} rows for {len(ids)} sample ids and "
                f"{len(timesteps)} timesteps"
            )
        ids, timesteps = ids.expand(rows), timesteps.expand(rows)
        own, mean_of = self._own_losses(losses, batch_loss, ids)
        if own is None and losses is not None and losses.contradicted:
            self._reads_losses = False  # another kind of loss agrees by chance now and then
        weight = accumulation / (mean_of * self.processes) * self.plan.stride
        looks = None
        if images is not None and len(images) == rows:
            looks = appearance(images)
            self.thumbnails.take(recorder.writer, ids, images)
        recorder.captured(ids, timesteps, step=self.step_count, weight=weight, losses=own, appearance=looks)
        self.scalars.add(engine.norms)
        self._batch_captured = True
        self._step_samples += rows // blocks(ids)
        self._step_captured = True
        self._step_seconds += time.perf_counter() - began + engine.hook_seconds

    def _own_losses(
        self, losses: SampleLosses | None, batch_loss: float | None, ids: Tensor
    ) -> tuple[Tensor | None, int]:
        """(R,) the rows' own losses if they are known, and over how many rows the loop takes a mean."""
        assert self.recorder is not None
        engine, rows, parts = self.recorder.engine, len(ids), blocks(ids)
        own = None if losses is None else losses.losses(rows / engine.loss_scale, batch_loss)
        if own is not None or parts == 1:
            return own, rows
        # Not a mean over all rows. Prior preservation adds the means of both halves, whatever their weights.
        scale = engine.loss_scale * parts
        own = None if losses is None else losses.losses(rows / scale, batch_loss, parts)
        if own is None and not bool((ids >= ROLE).any()):
            return None, rows
        engine.loss_scale = scale
        return own, rows // parts

    def _warn_of_second_backward(self) -> None:
        if self._batch_captured:
            self.warn_once(
                "a batch was differentiated twice: rows hold the gradient of the first backward only"
            )

    def warn_once(self, message: str, *found: object) -> None:
        """Say something that would be true of many steps, with what is ``found`` at the first."""
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message, *found)

    # ── an optimiser step ─────────────────────────────────────────────────────────────────────

    def zeroed(self) -> None:
        """Gradients were zeroed: without a step, unless it is a closure's beginning."""
        if not self.in_step:
            self.skipped()
        elif self._batch_captured:
            self.warn_once(
                "the optimiser calls its closure again: rows hold the gradients of the first call in a step"
            )

    def skipped(self) -> None:
        """Gradients were zeroed without a step, or not finite: the rows staged moved nothing."""
        self._step_samples = 0
        if self.recorder is not None:
            self.recorder.skipped()

    def stepped(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimiser has just moved the parameters; the scheduler has not moved the rate."""
        recorder = self.recorder
        if recorder is None:
            return
        began = time.perf_counter()
        recorder.stepped(self._rate(optimizer), self._step_samples * self.processes)
        self.step_count += 1
        now = time.perf_counter()
        captured = self._step_seconds + now - began if self._step_captured else None
        if self._step_began is not None and self.plan.finished_step(captured, now - self._step_began):
            self._tell_stride()
        self._step_began = now
        self._reset_step()
        if self._snapshot_every and self.step_count % self._snapshot_every == 0:
            self.snapshot()

    def _rate(self, optimizer: torch.optim.Optimizer) -> float:
        rates = learning_rates(optimizer)
        if len(set(rates)) > 1:
            self.warn_once(
                "the optimiser's groups have several learning rates (%s): the log, and the scores that go by "
                "it, take the first group's, %g, for all parameters",
                ", ".join(f"{rate:g}" for rate in sorted(set(rates))),
                rates[0],
            )
        return rates[0]

    def _tell_stride(self) -> None:
        if self.rank == 0:
            print(
                f"diffhook: capturing one step in {self.plan.stride} to stay within "
                f"{self.plan.overhead:.0%} overhead",
                flush=True,
            )

    def snapshot(self) -> None:
        """Keep the parameters as they are, and probe."""
        if self.recorder is None:
            return
        self._own_forward = True
        try:
            self.recorder.snapshot(self.step_count)
        finally:
            self._own_forward = False
            self._step_began = time.perf_counter()
