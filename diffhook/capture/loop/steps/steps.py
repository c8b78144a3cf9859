"""Optimiser steps, as they complete the rows of the passes before them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from diffhook.capture.loop import events
from diffhook.capture.loop.identity import Unmatched
from diffhook.capture.loop.micro_batch import MicroBatch
from diffhook.capture.loop.run.absences import Absences
from diffhook.capture.loop.steps.accumulated import AccumulatedGradients
from diffhook.capture.loop.steps.parameter_moves import ParameterMoves
from diffhook.capture.loop.steps.restored import RestoredParameters
from diffhook.capture.loop.steps.step_clock import StepClock
from diffhook.capture.loop.steps.stepped_weights import SteppedWeights
from diffhook.capture.loop.watches.optimizers import learning_rates
from diffhook.capture.plan import Plan
from diffhook.capture.recording.recorder import Recorder
from diffhook.compat.torch import in_backward
from diffhook.console import announce
from diffhook.gradients.sharding import keeps_gradients


class Steps:
    """Counts one process's optimiser steps, and tells the recorder of each.

    Args:
        plan: which steps are captured.
        absences: where what is left out is counted.
        are_seen: whether an optimiser of the trained parameters is known.
        rank, processes: this process's number, and how many share the batch.

    Attributes:
        count: steps taken.
        unlogged: steps taken before rows could be logged.
        samples: of the step under way that were captured.
        inside: an optimiser is at work, and calls a closure perhaps.
        in_backward: a backward is under way, in which parameters may be stepped one by one.
        end_missed: an error of ours came while an optimiser was at work, perhaps in place of its end.
        closure_captured: the closure of the step has made its rows; it may be called again.
        unnamed: in this step a model was trained on something that is not known.
        whose: rows the last training forward was on, as far as that is known.
    """

    def __init__(
        self,
        plan: Plan,
        absences: Absences,
        are_seen: Callable[[], bool],
        rank: int,
        processes: int,
    ) -> None:
        self.count = self.unlogged = 0
        self.samples = 0
        self.inside = self.in_backward = self.closure_captured = self.unnamed = False
        self.end_missed = False
        self.whose: MicroBatch | Unmatched | None = None
        self.clock = StepClock(plan)
        self._plan = plan
        self._absences = absences
        self._are_seen = are_seen
        self.rank, self.processes = rank, processes
        self._recorder: Recorder | None = None
        self._moves: ParameterMoves | None = None
        self._restored: RestoredParameters | None = None
        self._weights: SteppedWeights | None = None
        self._gradients: AccumulatedGradients | None = None
        self._due: events.StepEnded | None = None  # taken inside the backward

    @property
    def ended_within(self) -> bool:
        """Whether a step was taken inside the backward under way."""
        return self._due is not None

    @property
    def captured(self) -> bool:
        """Whether the step under way is one to capture."""
        return self._plan.captures(self.count)

    @property
    def captured_next(self) -> bool:
        """Whether the step after it is."""
        return self._plan.captures(self.count + 1)

    def follow(self, recorder: Recorder) -> None:
        """Tell this recorder of steps from now on."""
        self._recorder = recorder
        self._restored = RestoredParameters(recorder.engine.model, recorder.engine.parameters)
        self._weights = SteppedWeights(recorder.engine.model, recorder.engine.parameters)
        if keeps_gradients(recorder.engine.model):
            self._gradients = AccumulatedGradients(recorder.engine.parameters.values())

    def pass_begins(self) -> None:
        """A captured forward is about to run: what the loop has done since the last step can be seen now."""
        recorder = self._recorder
        assert recorder is not None
        self.check_restored(recorder)
        if self._weights is not None:
            self._weights.called()
        if not self._are_seen() and not recorder.staged_rows:
            if self._moves is None:
                self._moves = ParameterMoves(recorder.engine.parameters.values())
            self._moves.note()

    def pass_ended(self, samples: int, seconds: float) -> None:
        """Rows of so many samples are staged, which took so many seconds of our own."""
        self.samples += samples
        self.closure_captured = self.inside
        if self._gradients is not None:
            self._gradients.note()
        self.clock.captured(seconds)

    def backward_ended(self) -> bool:
        """Take the steps that were fused into the backward, as one. Returns whether there were any."""
        self.in_backward = False
        due, self._due = self._due, None
        return due is not None and self.ended(due)

    def settle_lost(self) -> None:
        """A step counts, also where an error of ours has kept its end from being seen."""
        if self.end_missed and self._recorder is not None:
            self._recorder.forget_staged()
            self.count += 1
            self.samples = 0
        elif self.end_missed:
            self.unlogged += 1
        self.inside = self.closure_captured = self.end_missed = False

    def began(self) -> None:
        if not in_backward():  # likewise of a backward
            self.in_backward = False
            self.settle_lost()
        self.inside = True
        if not self.in_backward:
            if self._gradients is not None:
                self._gradients.suspect()  # read once the step is under way: until then nobody waits
            if self._restored is not None:
                self._restored.step_began()

    def ended(self, event: events.StepEnded) -> bool:
        """A step is over. Returns whether it counts: it did not overflow, and rows are being logged."""
        if self.in_backward:  # parameter by parameter: the whole is one step
            self._due = event
            return False
        self.inside = self.closure_captured = self.end_missed = False
        if event.overflowed:
            self.moved_nothing()
            return False
        recorder = self._recorder
        self.unnamed = False
        if recorder is None:
            self.unlogged += 1
            return False
        if self._gradients is not None and self._gradients.are_gone(at_end=True):
            self.moved_nothing()
        try:
            began = self.clock.now()
            if self._restored is not None:
                self._restored.step_ended()
            if self._weights is not None:
                self._weights.stepped()
            recorder.stepped(
                self._rate(event.optimizer),
                self.samples * self.processes,
                hold=self._restored is not None and not self._restored.settled,
            )
        finally:
            self.count += 1
            self.samples = 0
        chosen = self.clock.finish_step(began)
        if self._plan.filled(recorder.row_bytes * self.processes):
            self._tell_stride("the log is filling up")
        elif chosen:
            self._tell_stride(f"within {self._plan.budget}")
        return True

    def weights_loaded(self) -> bool:
        """Whether the loop has put others in the place of the last step's weights, which is told."""
        loaded = self._weights is not None and self._weights.loaded
        if loaded:
            self._absences.tell(
                "loaded-weights",
                "the weights are not those that step %d has left: the loop has loaded others since, such as "
                "an average (EMA) or a checkpoint. A snapshot taken now is of these",
                self.count,
            )
        return loaded

    def zeroed(self) -> None:
        """Gradients were zeroed: without a step, unless it is a closure's beginning."""
        if not self.inside and not self.in_backward:
            self.moved_nothing()
        elif self.closure_captured:
            self._absences.tell(
                "closure",
                "the optimiser calls its closure again: rows hold the gradients of the first call in a step",
            )

    def moved_nothing(self) -> None:
        """Gradients were zeroed without a step, or not finite."""
        self.samples = 0
        if self._recorder is not None:
            self._recorder.skipped()

    def settle_unseen(self) -> bool:
        """A step may have been taken by nobody that is known: then the parameters have changed.

        Returns whether one was.
        """
        recorder = self._recorder
        if recorder is None or not recorder.staged_rows or self.inside:  # a closure zeroes before each call
            return False
        if self._moves is not None and not self._are_seen() and self._moves.moved():
            self._absences.tell(
                "unseen-step",
                "the parameters change without a step of an optimiser that is known: the log counts each "
                "change as a step of learning rate 1",
            )
            return self.ended(events.StepEnded())
        self._settle_zeroed()
        return False

    def _settle_zeroed(self) -> None:
        """The loop may have thrown gradients away without a word."""
        if self._gradients is not None:
            self._gradients.suspect()
            if self._gradients.are_gone():
                self.moved_nothing()

    def check_restored(self, recorder: Recorder) -> None:
        """Rows of steps whose parameters the loop put back held what it threw away."""
        if self._restored is None or self._restored.settled:
            return
        masks = self._restored.called()
        if not masks:
            recorder.release_held()
            return
        recorder.forget_held()
        recorder.engine.preconditioner = masks
        self._absences.leave_out(
            "restored-parameters",
            "the loop puts most rows of %s back after each step (textual inversion): norms and projections "
            "are of the rows that it keeps. The step that showed it is left out",
            ", ".join(masks),
        )

    def _rate(self, optimizer: torch.optim.Optimizer | None) -> float:
        rates = [] if optimizer is None else learning_rates(optimizer)
        if optimizer is not None and not rates:
            self._absences.tell(
                "no-rate",
                "%s has no learning rate of its own (lr is None): the log counts each step with rate 1",
                type(optimizer).__name__,
            )
        if len(set(rates)) > 1:
            self._absences.tell(
                "several-rates",
                "the optimiser's groups have several learning rates (%s): the log, and the scores that go by "
                "it, take the first group's, %g, for all parameters",
                ", ".join(f"{rate:g}" for rate in sorted(set(rates))),
                rates[0],
            )
        return rates[0] if rates else 1.0

    def _tell_stride(self, why: str) -> None:
        if self.rank == 0:
            announce(f"diffhook: capturing one step in {self._plan.stride} from here: {why}")
