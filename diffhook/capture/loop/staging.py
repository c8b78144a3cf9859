"""Makes rows of a finished pass, which wait with the recorder for the optimiser's step."""

from __future__ import annotations

from torch import Tensor

from diffhook.capture.appearance import appearance
from diffhook.capture.loop.absences import Absences
from diffhook.capture.loop.denoiser_calls import DenoiserCalls, timesteps_of
from diffhook.capture.loop.identity import blocks
from diffhook.capture.loop.loss_reader import LossReader
from diffhook.capture.loop.micro_batch import MicroBatch
from diffhook.capture.loop.objective_watch import ObjectiveWatch
from diffhook.capture.loop.scalars import Scalars
from diffhook.capture.loop.steps import Steps
from diffhook.capture.loop.thumbnails import ThumbnailTaker
from diffhook.capture.plan import Plan
from diffhook.capture.recorder import Recorder
from diffhook.errors import CaptureError

_STAGED_ROWS = 1 << 16  # without a step in between


class Staging:
    """Joins what is known of a pass to rows.

    Args:
        plan, steps: of the run.
        absences: where what is left out is counted.
        objective: is shown every pass that made rows.
        reduction: how the loop's loss joins the rows of a batch, "mean" or "sum".
        thumbnails: longest side of those to keep; 0: none.

    Attributes:
        losses: reads the rows' own losses.
        objective: as given.
        scalars: sums up the rows, for trackers.
        passes: of which rows were made.
    """

    def __init__(
        self,
        plan: Plan,
        steps: Steps,
        absences: Absences,
        objective: ObjectiveWatch,
        *,
        reduction: str,
        thumbnails: int,
    ) -> None:
        self.losses = LossReader(reduction)
        self.scalars = Scalars()
        self.passes = 0
        self._plan, self._steps, self._absences = plan, steps, absences
        self.objective = objective
        self._thumbnails = ThumbnailTaker(thumbnails)

    def timesteps(self, found: MicroBatch, calls: DenoiserCalls, recorder: Recorder) -> Tensor | None:
        """(B,) of the calls that the loss came from, in the scheduler's units; None: they are several.

        Raises:
            CaptureError: no call was told any.
        """
        if found.timesteps is not None:
            return found.timesteps
        told = timesteps_of(calls.of_loss())
        if not told:
            raise CaptureError(
                "what is trained was called without a timestep (keyword 'timestep' or second argument): name "
                "it with hook.step(sample_ids=..., timesteps=...), as where another model is trained through "
                "a frozen denoiser (textual inversion)"
            )
        if len(told) > 1:
            self._absences.leave_out(
                "several-timesteps",
                "the loss comes from calls of the denoiser at different timesteps, and a row has one: such "
                "micro-batches are left out. Call a backward for each, or name one: hook.step(timesteps=...)",
            )
            return None
        scale = float(getattr(recorder.prober.objective, "timestep_scale", 1.0))
        return told[0] if scale == 1 else told[0].float() / scale

    def stage(self, found: MicroBatch, timesteps: Tensor, calls: DenoiserCalls, recorder: Recorder) -> bool:
        """The engine has finished the pass. Returns whether there are rows of it."""
        engine = recorder.engine
        rows = len(engine.norms)
        if not self._fits(rows, found, timesteps, recorder):
            return False
        found = found.knowing(prediction=calls.prediction)
        reading, mean_of = self.losses.read(found, engine)
        looks = None
        if found.images is not None and len(found.images) == rows:
            looks = appearance(found.images)
            self._thumbnails.take(recorder.writer, found.ids, found.images)
        coefficient = found.accumulation * found.factor / (mean_of * self._steps.processes)
        recorder.captured(
            found.ids,
            timesteps.expand(rows),
            step=self._steps.count,
            weight=coefficient * self._plan.stride,
            losses=reading.losses,
            appearance=looks,
        )
        self.scalars.add(engine.norms)
        self.passes += 1
        deciding = calls.deciding if calls.observed else None
        self.objective.pass_ended(deciding, (1 if mean_of == 1 else rows) / engine.loss_scale, found.ids)
        return True

    def samples(self, found: MicroBatch, recorder: Recorder) -> int:
        """Of the rows that the pass has made."""
        return len(recorder.engine.norms) // blocks(found.ids)

    def _fits(self, rows: int, found: MicroBatch, timesteps: Tensor, recorder: Recorder) -> bool:
        for count in (len(found.ids), len(timesteps)):
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
