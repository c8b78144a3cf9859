"""Snapshots and probes, which are taken between the loop's own forwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffhook.capture.loop.steps.steps import Steps
from diffhook.capture.recording.recorder import Recorder


class SnapshotTaker:
    """Has the recorder keep and probe the parameters.

    Args:
        steps: of the run.
        every: optimiser steps between snapshots; None: only when they are asked for.

    Attributes:
        measuring: forwards of ours are running, which are none of the training's.
    """

    def __init__(self, steps: Steps, every: int | None) -> None:
        self.measuring = False
        self._steps, self._every = steps, every

    def after_step(self, recorder: Recorder | None) -> None:
        """A step has been taken: perhaps it is one to keep."""
        if self._every and self._steps.count % self._every == 0:
            self.take(recorder)

    def take(self, recorder: Recorder | None) -> None:
        """Keep the parameters as they are now."""
        if recorder is not None:
            self._measure(recorder.snapshot, self._steps.count)

    def probe_at_end(self, recorder: Recorder | None, budget: float) -> None:
        """Probe all samples after the last step, as well as so many seconds allow."""
        if recorder is not None:
            self._measure(recorder.probe_at_end, self._steps.count, budget, self._steps.processes)

    def _measure(self, measure: Callable[..., None], *args: Any) -> None:
        """The time that it takes is none of the training's either."""
        self.measuring = True
        try:
            measure(*args)
        finally:
            self.measuring = False
            self._steps.clock.restart()
