"""How conspicuous samples are visit after visit."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import gammaincc

from diffhook.capture.alerts.tail import Tail
from diffhook.capture.alerts.visits import VisitHistory

Values = npt.NDArray[np.float64]

VISITS = 8
"""The last ones of a sample that count."""
SAMPLES = 1 << 20
"""Remembered by each process."""


class Judgement(NamedTuple):
    """Of the rows of a step.

    Attributes:
        joint: (rows,) −log of the probability that visits at random are so conspicuous together; NaN
            before a sample's second, and while it is still learned what is usual.
        alarms: (rows,) which of them exceed the level.
        level: what the run's own samples exceed at the rate.
    """

    joint: Values
    alarms: npt.NDArray[np.bool_]
    level: float


class Recurrence:
    """Joins what deviates at a sample's last visits, though one visit may never tell.

    The surprises of the visits, −log of the share of rows that deviate further at such timesteps, are
    summed (Fisher's method). Were visits independent, the sum would have a Gamma distribution; since some
    samples are harder than others by nature, how much is too much is learned from the run's other samples.

    Args:
        rate: alarms per visit, from a sample's second on, on a clean run.
        most: that a single visit's surprise counts at most; infinite: a single one may decide.
    """

    def __init__(self, rate: float, most: float = math.inf) -> None:
        self._single = Tail(rate)
        self._joint = Tail(rate)
        self._most = most
        self.visits = VisitHistory(VISITS, SAMPLES)  #: the surprises

    def __call__(self, samples: npt.NDArray[np.int64], deviations: Values) -> Judgement:
        """Judge the rows of a step, then remember them.

        Args:
            samples: (rows,) ids.
            deviations: (rows,), see :class:`~diffhook.capture.alerts.deviation.Deviation`.
        """
        surprises = np.minimum(self._single.surprise(deviations), self._most)
        self._single.alarms(deviations)
        sums, counts = np.full((2, len(surprises)), np.nan)
        for index in np.flatnonzero(~np.isnan(surprises)):
            visits = self.visits.add(int(samples[index]), float(surprises[index]))
            if len(visits) > 1:
                sums[index], counts[index] = sum(visits), len(visits)
        joint = -np.log(np.maximum(gammaincc(counts, sums), 1e-300))
        level = self._joint.level
        return Judgement(joint, self._joint.alarms(joint), level)
