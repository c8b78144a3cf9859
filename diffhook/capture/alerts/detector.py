"""What looks at rows, and the register of what there is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import ClassVar

from diffhook.capture.alerts.alert import Alert
from diffhook.capture.alerts.deviation import Deviations
from diffhook.contract import check_answers, check_name
from diffhook.errors import ConfigurationError
from diffhook.log import Rows
from diffhook.log.samples import sample_words

DEFAULT_RATE = 1e-3


def checked_rate(rate: float) -> float:
    """The rate.

    Raises:
        ConfigurationError: not a small share.
    """
    if not 0 < rate < 0.1:
        raise ConfigurationError(
            f"rate is {rate}; expected a share of false alarms below 0.1, such as {DEFAULT_RATE}"
        )
    return rate


DETECTORS: dict[str, type[Detector]] = {}
"""Detectors by their name, which is also the ``kind`` of their alerts."""


class Detector(ABC):
    """Looks at the rows of each optimiser step as they are captured, on every rank.

    Args:
        rate: alarms per judgement that are acceptable where nothing is wrong. Detectors whose verdict
            leaves no doubt have no use for it.

    Attributes:
        deviations: of the rows' columns from what is usual at their timestep; those who watch one run
            have them in common.
        names: id → name, of samples that have one; the run's, and may grow.
    """

    kind: ClassVar[str] = "custom"

    def __init__(self, rate: float = DEFAULT_RATE) -> None:
        self.rate = checked_rate(rate)
        self.deviations = Deviations()
        self.names: Mapping[int, str] = {}

    def who(self, sample: int) -> str:
        """A sample as a message names it."""
        return f"sample {sample_words(sample, self.names)}"

    @abstractmethod
    def look(self, rows: Rows) -> Iterator[Alert]:
        """Alerts for the rows that this process saw in one optimiser step.

        The detector may remember them for the next.

        Args:
            rows: scalar columns of the log, (rows,) each, without the projection. lr is 0 where the
                step was skipped.
        """


_QUESTIONS = {
    "kind": "kind, the name of its alerts",
    "look": "look(rows), which gives alerts for the rows of a step",
}


def register(detector: type[Detector]) -> type[Detector]:
    """Class decorator: the class under its ``kind``. Every registered one watches unless the user chooses.

    Raises:
        ConfigurationError: it leaves out an answer, or another class has its kind.
    """
    check_answers(detector, Detector, "detector", _QUESTIONS)
    check_name(detector, detector.kind, "the detector", DETECTORS)
    DETECTORS[detector.kind] = detector
    return detector


def all_detectors(rate: float = DEFAULT_RATE) -> list[Detector]:
    """One of each registered kind."""
    return [detector(rate) for detector in DETECTORS.values()]
