"""Which optimiser steps are captured, and what that costs."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field

from diffhook.errors import ConfigurationError

_CALIBRATION_STEPS = 4  # captured one after the other before a stride is chosen; the first surveys


@dataclass
class Plan:
    """Captures one optimiser step in ``stride``; with a budget, chooses the stride itself.

    Args:
        every: the stride, fixed.
        overhead: instead, the largest share of the training time that capture may add.

    Raises:
        ConfigurationError: every < 1, or overhead not within (0, 1].
    """

    every: int = 1
    overhead: float | None = None
    capture_seconds: float = 0.0
    _costs: list[float] = field(default_factory=list)
    _steps: list[float] = field(default_factory=list)
    _anchor: int | None = None

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ConfigurationError(f"every is {self.every}; expected a positive integer")
        if self.overhead is not None and not 0 < self.overhead <= 1:
            raise ConfigurationError(
                f"overhead is {self.overhead}; expected a share of the training time, such as 0.05"
            )
        self.stride = self.every

    def captures(self, step: int) -> bool:
        """Whether to capture this optimiser step."""
        if self._anchor is None:
            self._anchor = step
        return (step - self._anchor) % self.stride == 0

    def finished_step(self, captured: float | None, seconds: float) -> bool:
        """Account for one optimiser step. Returns True when the stride has just been chosen.

        Args:
            captured: seconds that capture took; None for a step that was not captured.
            seconds: the step's duration in all.
        """
        self.capture_seconds += captured or 0.0
        if self.overhead is None or captured is None or len(self._costs) >= _CALIBRATION_STEPS:
            return False
        self._costs.append(captured)
        self._steps.append(seconds - captured)
        if len(self._costs) < _CALIBRATION_STEPS:
            return False
        share = statistics.median(self._costs[1:]) / statistics.median(self._steps[1:])
        self.stride = max(self.every, math.ceil(share / self.overhead))
        self._anchor = None
        return True
