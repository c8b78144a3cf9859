"""What the norm and the loss outlier have in common."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import numpy as np

from diffhook.capture.alerts.alert import Alert, about_row
from diffhook.capture.alerts.detector import DEFAULT_RATE, Detector
from diffhook.capture.alerts.tail import Tail
from diffhook.log import Rows


class Outlier(Detector):
    """Names samples that have far more in one column than others at similar timesteps.

    What counts as far is learned from the run, so that a clean one alarms at the given ``rate``.
    """

    column: ClassVar[str]
    words: ClassVar[str]  # a verb and, in braces, the multiple of what is usual

    def __init__(self, rate: float = DEFAULT_RATE) -> None:
        super().__init__(rate)
        self._tail = Tail(rate)

    def look(self, rows: Rows) -> Iterator[Alert]:
        deviations, ratios = self.deviations[self.column](rows)
        level = self._tail.level
        for index in np.flatnonzero(self._tail.alarms(deviations)):
            sample, timestep = int(rows["sample"][index]), float(rows["timestep"][index])
            what = self.words.format(float(ratios[index]))
            message = (
                f"{self.who(sample)} {what} near timestep {timestep:.4g} ({deviations[index]:.1f} "
                f"deviations; one row in {1 / self.rate:,.0f} reaches {level:.1f})"
            )
            yield about_row(self.kind, rows, int(index), float(deviations[index]), level, message)
