"""Which optimiser steps are captured, and what that costs."""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass, field

from diffhook.capture.budget import LOG_BYTES, Budget
from diffhook.errors import ConfigurationError

CAPTURED_STEP = 0.5
"""What capture adds to a step that trains every parameter, as examples/benchmarks/capture.py finds."""

_CALIBRATION = 5  # captured steps before a stride is chosen; the first surveys
_REVIEW = 32  # captured steps between looks at whether the stride still fits; fewer at first
_REMEMBERED = 32  # durations
_SPENT = 0.9  # of the budget; the rest is for the survey, snapshots and the steps after captured ones


def _durations() -> deque[float]:
    return deque(maxlen=_REMEMBERED)


@dataclass
class Plan:
    """Captures one optimiser step in ``stride``; with a budget, chooses the stride itself.

    What a captured step costs is measured against steps that are not: so it holds all that capture
    does to a step, not only the time spent in our own code. A budget is kept from the first step on, by
    what capture usually costs until that is measured, and looked at again from time to time. Its seconds
    besides the share are spent first, on every step.

    Args:
        every: the stride, fixed; with a budget, the smallest.
        budget: what capture may add to the training.

    Raises:
        ConfigurationError: every < 1.
    """

    every: int = 1
    budget: Budget | None = None
    capture_seconds: float = 0.0
    _captured: deque[float] = field(default_factory=_durations)
    _plain: deque[float] = field(default_factory=_durations)
    captured_steps: int = 0
    _next_look: int = _CALIBRATION
    _anchor: int | None = None
    _thinned: int = 0

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ConfigurationError(f"every is {self.every}; expected a positive integer")
        self.stride = self.every if self._unbound else self._fitting(CAPTURED_STEP)

    @property
    def _unbound(self) -> bool:
        """Whether nothing, or not yet, is to be saved."""
        return self.budget is None or self.capture_seconds < self.budget.seconds

    def _fitting(self, added: float) -> int:
        """The stride at which captured steps that take ``added`` of a step longer stay within the budget."""
        assert self.budget is not None
        # At least 2: without other steps beside it, the cost of a captured one could not be seen.
        return max(self.every, 2, math.ceil(added / (_SPENT * self.budget.share)))

    def allow(self, budget: Budget) -> None:
        """Events get all of this budget: nothing else will be had of it."""
        if self.budget is not None:
            self.budget = budget

    def filled(self, size: int) -> bool:
        """Account for the log's bytes. Returns True when fewer steps are captured from now on."""
        if self.budget is None or size < LOG_BYTES * (1 - 0.5 ** (self._thinned + 1)):
            return False
        self._thinned += 1
        self.every = self.stride = 2 * self.stride
        return True

    def captures(self, step: int) -> bool:
        """Whether to capture this optimiser step."""
        if self._anchor is None:
            self._anchor = step
        return (step - self._anchor) % self.stride == 0

    def finished_step(self, captured: float | None, seconds: float) -> bool:
        """Account for one optimiser step. Returns True when a stride has just been chosen.

        Args:
            captured: seconds spent in our own code; None for a step that was not captured.
            seconds: the step's duration in all.
        """
        if captured is None:
            self._plain.append(seconds)
            return False
        self.captured_steps += 1
        if self.captured_steps > 1:
            self._captured.append(seconds)
        usual = statistics.median(self._plain) if len(self._plain) >= _CALIBRATION - 1 else None
        if usual is not None and self._captured:
            # By the usual step of either kind: before this one there may have been a validation. What
            # our own code took is counted in any case.
            captured = max(statistics.median(self._captured) - usual, captured)
        self.capture_seconds += captured
        if self._unbound:
            return False
        if usual is None:
            return self._end_of_seconds()
        if self.captured_steps < self._next_look:
            return False
        self._next_look = self.captured_steps + min(self.captured_steps, _REVIEW)
        return self._choose(usual)

    def _end_of_seconds(self) -> bool:
        """Every step was captured so far: others are needed to be compared with."""
        if self.stride > 1 or self.captured_steps < _CALIBRATION:
            return False
        self.stride, self._anchor = self._fitting(CAPTURED_STEP), None
        self._next_look = self.captured_steps + _CALIBRATION
        self._captured.clear()
        return True

    def _choose(self, usual: float) -> bool:
        stride = self._fitting(max(statistics.median(self._captured) / usual - 1, 0.0))
        first = self.captured_steps == _CALIBRATION
        if not first and abs(stride - self.stride) <= 0.25 * self.stride:
            return False  # within the noise of a shared machine
        self.stride, self._anchor = stride, None
        return True
