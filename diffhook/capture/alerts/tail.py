"""How large is too large, learned from the values themselves."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]

_WARM_UP = 200  # values before anything alarms
_MEMORY = 8192  # values that count at most
_REFRESH = 64  # new values after which the levels are computed again
_BODY = 240  # values above the level where the tail begins …
_PRIOR = 5  # alarms by which those counted so far must differ from those due, to matter
_FAR = 30  # … and above the last level that is read off; beyond it the tail is extended


class Tail:
    """The level that a value exceeds with a given probability, from the values themselves.

    Nothing is assumed of the values but that their far tail falls off exponentially: levels that
    enough values exceed are quantiles; beyond the last of them the tail's own slope is followed. Only
    the later half of the values counts, 8192 at most: the beginning of a training is like nothing
    after it. Of the values that alarmed the share ``rate`` counts, which alarms by chance; the
    others are broken samples, which should not raise the level that names them. Once most values do,
    they are the usual ones: the tail is learned anew.

    Args:
        rate: the probability.
    """

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self._begin()

    def _begin(self) -> None:
        self.level = math.inf
        self._values: Values = np.empty(0)  # infinite: it alarmed
        self._calm: Values = np.empty(0)  # the others, sorted
        self._missing = 0.0  # share of values that belongs above all calm ones
        self._seen = self._new = self._judged = self._alarmed = 0
        self._far = (1.0, 0.0, 1.0)  # probability, level and slope where the extension begins

    def alarms(self, values: Values) -> npt.NDArray[np.bool_]:
        """(n,) which of the values exceed the level; they are remembered. NaN never does."""
        found = values > self.level
        if not math.isinf(self.level):
            self._judged += int(np.count_nonzero(~np.isnan(values)))
            self._alarmed += int(np.count_nonzero(found))
        new = np.where(found, math.inf, values)[~np.isnan(values)]
        self._seen += len(new)
        self._new += len(new)
        memory = min(max(self._seen // 2, _WARM_UP), _MEMORY)
        self._values = np.concatenate([self._values, new])[-memory:]
        if self._seen >= _WARM_UP and (self._new >= _REFRESH or math.isinf(self.level)):
            self._new = 0
            self._learn()
        return found

    def surprise(self, values: Values) -> Values:
        """(n,) −log of the probability that a value is exceeded; NaN during the warm-up."""
        if math.isinf(self.level):
            return np.full(len(values), np.nan)
        probability, level, slope = self._far
        above = len(self._calm) - np.searchsorted(self._calm, values, side="left")
        share = self._missing + (1 - self._missing) * (above + 1) / (len(self._calm) + 1)
        return np.where(values > level, (values - level) / slope - math.log(probability), -np.log(share))

    def _learn(self) -> None:
        self._calm = np.sort(self._values[np.isfinite(self._values)])
        count = len(self._values)
        if 2 * len(self._calm) < count:
            return self._begin()
        self._missing = min(1 - len(self._calm) / count, self.rate)
        near = min(max(_BODY / count, 6 * self.rate), 0.4)
        far = min(max(_FAR / count, 3 * self.rate), near / 2)
        begin, level = self._quantile(near), self._quantile(far)
        slope = max((level - begin) / math.log(near / far), 1e-9)
        self._far = (far, level, slope)
        due = (self.rate * self._judged + _PRIOR) / (self._alarmed + _PRIOR)
        target = self.rate * min(max(due, 0.5), 2.0)
        self.level = level + slope * math.log(far / target)

    def _quantile(self, probability: float) -> float:
        """The level exceeded with this probability."""
        seen = (probability - self._missing) / (1 - self._missing)
        return float(np.quantile(self._calm, 1 - seen))
