"""Snapshots and probes, which are taken between the loop's own forwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffhook.capture.loop.steps.steps import Steps
from diffhook.capture.recording.recorder import Recorder
from diffhook.console import announce


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
        self._stepped: int | None = None  # the step whose own weights were kept last

    def after_step(self, recorder: Recorder | None) -> None:
        """A step has been taken: perhaps it is one to keep."""
        if self._every and self._steps.count % self._every == 0:
            self.take(recorder)

    def take(self, recorder: Recorder | None) -> None:
        """Keep the parameters as they are now."""
        if recorder is None:
            return
        loaded = self._steps.weights_loaded()
        if not loaded:
            self._stepped = self._steps.count
        self._measure(
            recorder.snapshot,
            self._steps.count,
            loaded=loaded,
            probed=not (loaded and self._steps.processes > 1),
        )

    def probe_at_end(self, recorder: Recorder | None, budget: float) -> None:
        """Probe all samples after the last step, as well as so many seconds allow.

        Where the loop has loaded other weights since, such as an average, those that the log has of the
        step are probed: the step's own, or where nothing was kept of it before, the loaded ones. Those
        perhaps only one process has.
        """
        if recorder is None:
            return
        steps = self._steps
        loaded = steps.weights_loaded()
        as_kept = loaded and self._stepped == steps.count
        unlike = loaded and not as_kept and steps.processes > 1
        if unlike and not steps.rank:
            announce(
                "diffhook: no probe at the end: this process has other weights by now than the last step's, "
                "which others may hold. `diffhook checkpoints` measures samples later"
            )
        self._measure(
            recorder.probe_at_end,
            steps.count,
            budget,
            steps.processes,
            probed=not unlike,
            as_kept=as_kept,
        )

    def _measure(self, measure: Callable[..., None], *args: Any, **options: Any) -> None:
        """The time that it takes is none of the training's either."""
        self.measuring = True
        try:
            measure(*args, **options)
        finally:
            self.measuring = False
            self._steps.clock.restart()
