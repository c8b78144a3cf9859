"""Samples that count less in the training while their losses stay far above others' at their timesteps."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffhook.capture.alerts.alert import Alert, about_row
from diffhook.capture.alerts.detector import DEFAULT_RATE, checked_rate
from diffhook.capture.alerts.deviation import Deviations
from diffhook.capture.alerts.recurrence import SAMPLES, VISITS, Recurrence
from diffhook.capture.alerts.visits import VisitHistory
from diffhook.errors import ConfigurationError
from diffhook.log import Rows
from diffhook.log.alerts import THROTTLE
from diffhook.log.samples import sample_words

logger = logging.getLogger("diffhook")

_BLIND = 64  # rows without a loss after which that is told
_EIGHTHS = 8  # exact in half precision, too
_SURPRISE = -math.log(0.01)  # of one visit at most: a single noisy one throttles nobody


@dataclass(frozen=True)
class Throttle:
    """How much less samples count whose losses stay far above those of others at their timesteps.

    A sample whose last visits are together too conspicuous to be chance has its loss multiplied by
    1 / (how many times the usual loss it has, the geometric mean over those visits), in eighths; and counts
    in full again once it is not. Losses are the sample's own, without the factor, of captured steps; where
    they cannot be read off (a loss that is no weighted mean of the prediction's errors), nobody is throttled.

    Attributes:
        rate: the share of visits that may be throttled, of a sample's second on, where nothing is wrong.
        floor: the smallest factor, above 0 and at most 1.

    Raises:
        ConfigurationError: a value out of range.
    """

    rate: float = DEFAULT_RATE
    floor: float = 1 / _EIGHTHS

    def __post_init__(self) -> None:
        checked_rate(self.rate)
        if not 0 < self.floor <= 1:
            raise ConfigurationError(f"floor is {self.floor}; expected a factor above 0 and at most 1")

    def factor(self, ratio: float) -> float:
        """For a loss that is so many times the usual one."""
        return min(max(round(_EIGHTHS / ratio) / _EIGHTHS, self.floor), 1.0)


class Factors:
    """What each sample's loss is multiplied by, learned from its rows by one process.

    Args:
        throttle: the user's wishes.
        deviations: of the rows' columns, those of the run's detectors.
    """

    def __init__(self, throttle: Throttle, deviations: Deviations) -> None:
        self.names: Mapping[int, str] = {}  #: of samples that have one
        self.below: dict[int, float] = {}  #: sample → factor, where it is not 1
        self.throttled: set[int] = set()  #: samples that ever had one below 1
        self._blind: int | None = 0  # rows without a loss; None: there was one, or it was told
        self._throttle = throttle
        self._deviations = deviations
        self._recurrence = Recurrence(throttle.rate, _SURPRISE)
        self._ratios = VisitHistory(VISITS, SAMPLES)  # of losses to the usual, in logs

    def of(self, samples: Tensor) -> Tensor | None:
        """(B,) float32 factors of the samples, on the CPU; None if all are 1."""
        found = [self.below.get(sample, 1.0) for sample in samples.tolist()] if self.below else []
        return torch.tensor(found) if any(factor < 1 for factor in found) else None

    def look(self, rows: Rows) -> Iterator[Alert]:
        """Learn from the rows of an optimiser step. A record of each factor that has changed."""
        self._count_blind(rows)
        deviations, ratios = self._deviations["loss"](rows)
        judged = self._recurrence(rows["sample"], deviations)
        for index in np.flatnonzero(~np.isnan(deviations)):
            sample = int(rows["sample"][index])
            logs = self._ratios.add(sample, math.log(ratios[index]))
            ratio = math.exp(sum(logs) / len(logs))
            factor = self._throttle.factor(ratio) if judged.alarms[index] else 1.0
            if factor != self.below.get(sample, 1.0):
                self._set(sample, factor)
                words = self._words(sample, factor, ratio, len(logs))
                yield about_row(THROTTLE, rows, int(index), factor, judged.level, words)

    def _count_blind(self, rows: Rows) -> None:
        if self._blind is None or np.isfinite(rows["loss"]).any():
            self._blind = None
            return
        self._blind += len(rows["loss"])
        if self._blind >= _BLIND:
            self._blind = None
            logger.warning(
                "the throttle throttles nobody: of %d rows so far none has a loss of its own, which is read "
                "off a training loss that is a weighted mean of squared, absolute or Huber errors",
                _BLIND,
            )

    def restore(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Take over what an earlier run's records say of samples that none of the rows seen so far was of."""
        for record in records:
            for sample in record["samples"] if record["kind"] == THROTTLE else ():
                if not self._ratios.of(sample):
                    self._set(sample, float(record["value"]))

    def _set(self, sample: int, factor: float) -> None:
        if factor < 1:
            self.below[sample] = factor
            self.throttled.add(sample)
        else:
            self.below.pop(sample, None)

    def _words(self, sample: int, factor: float, ratio: float, visits: int) -> str:
        who = f"sample {sample_words(sample, self.names)}"
        if factor == 1:
            return f"{who} counts in full again: its loss is no longer conspicuous"
        return (
            f"the loss of {who} is multiplied by {factor:.3g} from now on: at its last {visits} visits it "
            f"was {ratio:.1f} times the usual one at such timesteps"
        )
