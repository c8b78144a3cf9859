"""How long optimiser steps take, with and without capture."""

from __future__ import annotations

import time

from diffhook.capture.plan import Plan


class StepClock:
    """Accounts for the time of every optimiser step, for the plan.

    Args:
        plan: chooses its stride by what captured steps cost.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._step_began: float | None = None
        self._seconds = 0.0  # of the step's capture
        self._captured = False

    def now(self) -> float:
        return time.perf_counter()

    def forward_began(self) -> None:
        """The clock starts with the first forward: what came before was no step."""
        if self._step_began is None:
            self._step_began = self.now()

    def captured(self, seconds: float) -> None:
        """A pass of this step took so many seconds of our own code."""
        self._seconds += seconds
        self._captured = True

    def finish_step(self, began: float) -> bool:
        """A step is over, whose account was begun at ``began``. True when a stride has just been chosen."""
        now = self.now()
        seconds = self._seconds + now - began if self._captured else None
        chosen = self._step_began is not None and self._plan.finished_step(seconds, now - self._step_began)
        self._step_began = now
        self._seconds, self._captured = 0.0, False
        return chosen

    def restart(self) -> None:
        """What was done since the step's end is no part of the next."""
        self._step_began = self.now()
