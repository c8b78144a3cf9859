"""A sample that is conspicuous again and again."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy.special import gammaincc

from diffhook.capture.alerts.alert import Alert, about_row
from diffhook.capture.alerts.detector import DEFAULT_RATE, Detector, register
from diffhook.capture.alerts.tail import Tail
from diffhook.capture.alerts.visits import VisitHistory
from diffhook.log import Rows

_VISITS = 8  # the last ones of a sample that count
_SAMPLES = 1 << 20  # remembered by each process


@register
class RepeatedOffender(Detector):
    """Names samples that pull hard on visit after visit, though perhaps never so that one visit tells.

    The surprises of a sample's last visits, −log of the share of rows that deviate further at such
    timesteps, are summed (Fisher's method). Were visits independent, the sum would have a Gamma
    distribution; since some samples are harder than others by nature, how much is too much is learned
    from the run's other samples. A sample that was named begins anew: the same visits do not name it
    again, and false alarms do not come in rows.

    Each process remembers the 2²⁰ samples that it met last for the first time: of a larger dataset, visits
    that lie further apart do not add up.

    Args:
        rate: alarms per visit, from a sample's second on, on a clean run.
    """

    kind = "repeated-offender"

    def __init__(self, rate: float = DEFAULT_RATE) -> None:
        super().__init__(rate)
        self._single = Tail(rate)
        self._joint = Tail(rate)
        self._visits = VisitHistory(_VISITS, _SAMPLES)

    def look(self, rows: Rows) -> Iterator[Alert]:
        deviations, _ = self.deviations["grad_norm"](rows)
        surprises = self._single.surprise(deviations)
        self._single.alarms(deviations)
        sums, counts = np.full((2, len(surprises)), np.nan)
        for index in np.flatnonzero(~np.isnan(surprises)):
            visits = self._visits.add(int(rows["sample"][index]), float(surprises[index]))
            if len(visits) > 1:
                sums[index], counts[index] = sum(visits), len(visits)
        joint = -np.log(np.maximum(gammaincc(counts, sums), 1e-300))
        level = self._joint.level
        for index in np.flatnonzero(self._joint.alarms(joint)):
            sample = int(rows["sample"][index])
            visits = self._visits.of(sample)
            if not visits:  # another row of the step has just named it
                continue
            typical, count = np.exp(-np.mean(visits)), len(visits)
            self._visits.forget(sample)
            yield about_row(
                self.kind,
                rows,
                int(index),
                float(joint[index]),
                level,
                f"{self.who(sample)} keeps pulling hard: on its last {count} visits only "
                f"{typical:.1%} of other samples pulled harder at such timesteps, on average",
            )
