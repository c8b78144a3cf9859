"""A sudden shift of all gradients at once: the run, not a sample."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator

import numpy as np

from diffhook.capture.alerts.alert import Alert
from diffhook.capture.alerts.detector import DEFAULT_RATE, Detector, register
from diffhook.capture.alerts.tail import Tail
from diffhook.log import Rows

_ROWS = 128  # the time that "sudden" means, in rows …
_STEPS = 4  # … but no fewer steps than this
_QUIET = 50  # steps after an alarm in which the same shift would alarm again


@register
class Drift(Detector):
    """Tells when the gradient norms of the whole run grow or shrink suddenly, at all timesteps alike.

    The shift within the last 128 rows is compared with such shifts earlier in the run: that a model
    learns is no news.

    Args:
        rate: alarms per step on a clean run.
        factor: the smallest growth (or shrinkage) that alarms.
    """

    kind = "drift"

    def __init__(self, rate: float = DEFAULT_RATE, factor: float = 1.5) -> None:
        super().__init__(rate)
        self.factor = factor
        self._tail = Tail(rate)
        self._levels: deque[float] = deque()
        self._quiet = 0

    def look(self, rows: Rows) -> Iterator[Alert]:
        deviation = self.deviations["grad_norm"]
        deviation(rows)
        steps = max(math.ceil(_ROWS / max(len(rows["sample"]), 1)), _STEPS)
        self._levels.append(deviation.level)
        while len(self._levels) > steps + 1:
            self._levels.popleft()
        self._quiet = max(self._quiet - 1, 0)
        if len(self._levels) <= steps:
            return
        shift = self._levels[-1] - self._levels[0]
        level = max(self._tail.level, math.log(self.factor))
        alarmed = self._tail.alarms(np.array([abs(shift)]))[0]
        if not alarmed or abs(shift) <= level or self._quiet:
            return
        self._quiet = _QUIET
        factor, change = math.exp(abs(shift)), "grown" if shift > 0 else "shrunk"
        yield Alert(
            kind=self.kind,
            level="warning",
            samples=[],
            step=int(rows["step"][0]),
            timestep=math.nan,
            value=factor,
            threshold=math.exp(level),
            message=f"the gradients of the whole run have {change} {factor:.1f}-fold within {steps} "
            "steps, at all timesteps: look at the learning rate, and at what changed in the data",
        )
