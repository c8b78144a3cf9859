"""Makes rows of a finished pass, which wait with the recorder for the optimiser's step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

from torch import Tensor

from diffhook.capture.loop.events import Event, StepBegan
from diffhook.capture.loop.identity import blocks
from diffhook.capture.loop.losses.denoiser_calls import timesteps_of
from diffhook.capture.loop.losses.loss_reader import LossReader
from diffhook.capture.loop.losses.objective_watch import ObjectiveWatch
from diffhook.capture.loop.run.absences import Absences
from diffhook.capture.loop.run.scalars import Scalars
from diffhook.capture.loop.session.throttling import Throttling
from diffhook.capture.loop.session.thumbnails import ThumbnailTaker
from diffhook.capture.loop.session.training_pass import TrainingPass
from diffhook.capture.loop.steps.steps import Steps
from diffhook.capture.plan import Plan
from diffhook.capture.samples.appearance import appearance
from diffhook.errors import CaptureError
from diffhook.gradients import Guard
from diffhook.log.samples import ROLE_STRIDE

_STAGED_ROWS = 1 << 16  # without a step in between


class Staging:
    """Joins what is known of a pass to rows.

    Args:
        plan, steps: of the run.
        absences: where what is left out is counted.
        aside: within it, what we do is not taken for the loop's.
        objective: recognises the training loss; is shown every pass that made rows.
        reduction: how the loop's loss joins the rows of a batch, "mean" or "sum".
        thumbnails: longest side of those to keep; 0: none.
        shield: through which runs what is called by the loop's own operations.

    Attributes:
        losses: reads the rows' own losses.
        objective: as given.
        throttling: knows by what the rows' gradients were multiplied.
        scalars: sums up the rows, for trackers.
        passes: how many were staged, whether or not their rows have been made.
        made: whether the last one's rows have been.
    """

    def __init__(
        self,
        plan: Plan,
        steps: Steps,
        absences: Absences,
        aside: Callable[[], AbstractContextManager[None]],
        *,
        objective: ObjectiveWatch,
        shield: Guard,
        reduction: str = "mean",
        thumbnails: int = 0,
    ) -> None:
        self.losses = LossReader(reduction)
        self.scalars = Scalars()
        self.passes = 0
        self.made = False
        self._plan, self._steps, self._absences = plan, steps, absences
        self.objective = objective
        self.throttling = Throttling(shield)
        self._thumbnails = ThumbnailTaker(thumbnails)
        self._aside = aside
        self._unread: Callable[[], None] | None = None

    @property
    def needs_rows(self) -> bool:
        """Whether it must be known whose rows the batch to come holds."""
        return self._steps.captured or self.throttling.is_active()

    def timesteps(self, ended: TrainingPass) -> Tensor | None:
        """(B,) of the calls that the loss came from, in the model's units; None: they are several.

        Raises:
            CaptureError: no call was told any.
        """
        if ended.micro_batch.timesteps is not None:
            return ended.micro_batch.timesteps
        told = timesteps_of(ended.calls.of_loss())
        if not told:
            raise CaptureError(ended.why_no_timesteps)
        if len(told) > 1:
            self._absences.leave_out(
                "several-timesteps",
                "the loss comes from calls of the denoiser at different timesteps, and a row has one: such "
                "micro-batches are left out. Call a backward for each, or name one: hook.step(timesteps=...)",
            )
            return None
        ended.recorder.units.note(whole=not told[0].is_floating_point())
        return told[0]

    def stage(self, ended: TrainingPass, timesteps: Tensor) -> bool:
        """The engine has finished the pass. Returns whether there will be rows of it, by :meth:`read`.

        Nothing is waited for, unless thumbnails are taken: values are read once the step is under way.
        """
        rows, found = ended.engine.samples, ended.micro_batch
        if not self._fits(rows, ended, timesteps):
            return False
        statistics = None
        if found.images is not None and len(found.images) == rows:
            statistics = appearance(found.images)
            self._thumbnails.take(ended.recorder.writer, found.ids, found.images)
        loss = None if found.loss is None else found.loss.detach().clone()  # to which loops add
        prediction, factors = ended.calls.prediction, self.throttling.factors
        if prediction is not None and factors is not None:
            prediction.without(factors)
        ended.learn(prediction=prediction, loss=loss, factors=factors)
        self._unread = partial(self._read, ended, timesteps, statistics)
        self.passes += 1
        self.made = False
        return True

    def read_before(self, event: Event) -> None:
        """:meth:`read` once the optimiser's step is under way: at the next event but its beginning."""
        if not isinstance(event, StepBegan):
            self.read()

    def read(self) -> None:
        """Make the rows of the pass that was staged last, unless they are made. Waits for its device."""
        unread, self._unread = self._unread, None
        if unread is not None:
            began = self._steps.clock.now()
            with self._aside():
                unread()
            self.made = True
            self._steps.clock.captured(self._steps.clock.now() - began)

    def forget(self) -> None:
        """Discard the staged pass: no rows are made of it."""
        self._unread = None

    def _read(self, ended: TrainingPass, timesteps: Tensor, statistics: Tensor | None) -> None:
        found, calls, engine = ended.micro_batch, ended.calls, ended.engine
        rows = engine.samples
        reading, mean_of = self.losses.read(found, engine)
        if reading.contradicted:
            self._absences.tell("no-losses")
        if reading.contradicted and blocks(found.ids) > 1 and bool((found.ids < ROLE_STRIDE).all()):
            self._absences.tell("several-parts", None, blocks(found.ids))
        coefficient = found.accumulation * found.factor / (mean_of * self._steps.processes)
        norms = ended.recorder.captured(
            found.ids,
            timesteps.expand(rows),
            step=self._steps.count,
            weight=coefficient * self._plan.stride,
            factors=found.factors,
            losses=reading.losses,
            appearance=statistics,
        )
        self.scalars.add(norms)
        deciding = calls.deciding if calls.observed else None
        undo = (1 if mean_of == 1 else rows) / engine.loss_scale
        self.objective.pass_ended(deciding, undo, found.ids, found.images)

    def samples(self, ended: TrainingPass) -> int:
        """How many samples the pass's rows are of."""
        return ended.engine.samples // blocks(ended.micro_batch.ids)

    def _fits(self, rows: int, ended: TrainingPass, timesteps: Tensor) -> bool:
        recorder = ended.recorder
        for count in (len(ended.micro_batch.ids), len(timesteps)):
            if count not in (1, rows):
                self._absences.leave_out_rows(rows, count)
                return False
        if recorder.staged_rows + rows > _STAGED_ROWS:
            self._absences.leave_out(
                "no-step",
                "no optimiser step was seen for %d rows: further rows are left out until there is one",
                recorder.staged_rows,
            )
            return False
        return True
