"""A sample that is conspicuous again and again."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from diffhook.capture.alerts.alert import Alert, about_row
from diffhook.capture.alerts.detector import DEFAULT_RATE, Detector, register
from diffhook.capture.alerts.recurrence import Recurrence
from diffhook.log import Rows


@register
class RepeatedOffender(Detector):
    """Names samples whose gradients are large visit after visit, see
    :class:`~diffhook.capture.alerts.recurrence.Recurrence`.

    A sample that was named begins anew: the same visits do not name it again, and false alarms do not come
    in rows.

    Each process remembers the 2²⁰ samples that it met last for the first time: of a larger dataset, visits
    that lie further apart do not add up.

    Args:
        rate: alarms per visit, from a sample's second on, on a clean run.
    """

    kind = "repeated-offender"

    def __init__(self, rate: float = DEFAULT_RATE) -> None:
        super().__init__(rate)
        self._recurrence = Recurrence(rate)

    def look(self, rows: Rows) -> Iterator[Alert]:
        deviations, _ = self.deviations["grad_norm"](rows)
        joint, alarms, level = self._recurrence(rows["sample"], deviations)
        for index in np.flatnonzero(alarms):
            sample = int(rows["sample"][index])
            visits = self._recurrence.visits.of(sample)
            if not visits:  # another row of the step has just named it
                continue
            typical, count = np.exp(-np.mean(visits)), len(visits)
            self._recurrence.visits.forget(sample)
            yield about_row(
                self.kind,
                rows,
                int(index),
                float(joint[index]),
                level,
                f"{self.who(sample)} keeps having large gradients: on its last {count} visits only "
                f"{typical:.1%} of other samples had larger ones at such timesteps, on average",
            )
