"""Applies the throttle's factors in every step, whether or not it is captured."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

from torch import Tensor

from diffhook.capture.alerts import Factors, Watch
from diffhook.capture.loop import events
from diffhook.capture.loop.micro_batch import MicroBatch
from diffhook.capture.loop.session.throttled_pass import ThrottledPass
from diffhook.capture.loop.tracing.row_finder import RowFinder
from diffhook.capture.loop.watches.call_inspection import timestep_last
from diffhook.compat.torch import in_backward
from diffhook.gradients import Guard
from diffhook.words import plural

logger = logging.getLogger("diffhook")

_WHY_NOT = {
    "unknown-samples": "whose rows the model was called on is not known. Name them with "
    "hook.step(sample_ids=...)",
    "several-batches": "the model was called on other samples before the backward of the first. Call a "
    "backward for each",
    "chained-calls": "one call of the denoiser feeds another, such as a ControlNet the model behind it, and "
    "a row's loss may depend on both",
    "other-rows": "what the model predicts has not a row for each sample id",
    "no-prediction": "no call was told timesteps whose output needs a gradient",
    "failed": "an error of ours came in between",
    "unseen-forward": "the call of the model was not seen, as in compiled code: with every=1 all steps are "
    "captured, and run uncompiled",
}
"""Kind → why micro-batches that hold a throttled sample count in full, in words."""


class Throttling:
    """Follows the loop's events after the session has taken them; does nothing while all factors are 1.

    Args:
        shield: through which runs what a backward calls.

    Attributes:
        watch: has learned the factors; None before the first captured forward.
        applied: micro-batches that were throttled.
        missed: kind of the reason → micro-batches that should have been.
    """

    def __init__(self, shield: Guard) -> None:
        self._shield = shield
        self.watch: Watch | None = None
        self.applied = 0
        self.missed: Counter[str] = Counter()
        self._pass: ThrottledPass | None = None
        self._called = False  # a model, since the last optimiser step
        self._unknown = False  # it is not known whose rows a model was called on since

    @property
    def _learned(self) -> Factors | None:
        return None if self.watch is None else self.watch.factors

    def is_active(self) -> bool:
        """Whether some sample counts less, so that batches' samples must be known in every step."""
        return self._learned is not None and bool(self._learned.below)

    @property
    def factors(self) -> Tensor | None:
        """(B,) float32, by which the gradients of the pass under way were multiplied; None: by 1."""
        return None if self._pass is None else self._pass.applied

    def follow(self, event: events.Event, whose: object, rows: RowFinder) -> None:
        """The session has taken an event.

        Args:
            whose: rows the last training forward was called on, as far as it is known.
            rows: finds those of further calls.
        """
        if isinstance(event, events.BatchReceived):
            self._end_pass()
            self._unknown = False
        elif isinstance(event, events.DenoiserCalled):
            self._on_call(event, whose, rows)
        elif isinstance(event, events.ForwardBegan):
            if event.training:
                self._on_call(event, whose, rows)
        elif isinstance(event, events.OutputSeen) and self._pass is not None:
            self._pass.answered(event.module, event.output)
        elif isinstance(event, events.StepEnded):
            self._on_step(rows.last)

    def _on_call(
        self, event: events.ForwardBegan | events.DenoiserCalled, whose: object, rows: RowFinder
    ) -> None:
        if in_backward():  # computed again, as checkpointing does
            return
        begins = isinstance(event, events.ForwardBegan)
        self._called = True
        if begins and (self._pass is None or self._pass.over):
            self._end_pass()
            if self.is_active() and isinstance(whose, MicroBatch):
                self._pass = ThrottledPass(whose, self._factors_of, self._shield)
            elif self.is_active() and not self._unknown:
                self._unknown = True
                self._miss("unknown-samples")
        if self._pass is not None:
            shown = rows.shown(timestep_last(event.module, event.args, event.kwargs))
            self._pass.called(event.module, event.args, event.kwargs, shown)

    def _factors_of(self, ids: Tensor) -> Tensor | None:
        return None if self._learned is None else self._learned.of(ids)

    def _end_pass(self) -> None:
        """Count it, unless none of its samples is throttled or no backward came, as far as that is seen."""
        ended, self._pass = self._pass, None
        if ended is None or ended.factors is None:
            return
        if ended.why_not:
            self._miss(ended.why_not)
        else:
            self.applied += ended.reached

    def _on_step(self, batch: object) -> None:
        called, self._called = self._called, False
        if not called and isinstance(batch, MicroBatch) and self._factors_of(batch.ids) is not None:
            self._miss("unseen-forward")

    def _miss(self, kind: str) -> None:
        if not self.missed[kind]:
            logger.warning("throttled samples count in full in some micro-batches: %s", _WHY_NOT[kind])
        self.missed[kind] += 1

    def summary(self) -> tuple[dict[str, Any], str]:
        """What was throttled, as JSON and as a line of text; empty where the throttle is off."""
        learned = self._learned
        if learned is None:
            return {}, ""
        self._end_pass()
        found = {
            "samples": len(learned.throttled),
            "micro_batches": self.applied,
            "missed": dict(self.missed),
        }
        text = f"\n  throttled: {plural(len(learned.throttled), 'sample')}, in {self.applied:,} micro-batches"
        if self.missed:
            reasons = ", ".join(f"{count:,} {kind}" for kind, count in self.missed.items())
            text += f"; in others they counted in full: {reasons}"
        return {"throttle": found}, text
