"""The sinks that need nobody else: Python's logging, in full or in brief."""

from __future__ import annotations

import logging
from collections import Counter

from diffhook.capture.alerts.alert import Alert

logger = logging.getLogger("diffhook")

_LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
_MILESTONES = {10**power for power in range(1, 10)}


def to_logging(alert: Alert) -> None:
    """One record of the logger "diffhook"."""
    logger.log(_LEVELS[alert.level], "step %d: %s", alert.step, alert.message)


class Brief:
    """The default in a training run: beside a progress bar, the first alert of each kind in words.

    Of the others it tells how many there were, at the tenth, the hundredth and so on; the log has them all.
    """

    def __init__(self) -> None:
        self._told: Counter[str] = Counter()

    def __call__(self, alert: Alert) -> None:
        self._told[alert.kind] += 1
        count = self._told[alert.kind]
        if count == 1:
            more = "others of this kind are counted, and listed by `diffhook alerts`"
            logger.log(_LEVELS[alert.level], "step %d: %s; %s", alert.step, alert.message, more)
        elif count in _MILESTONES:
            logger.log(_LEVELS[alert.level], "step %d: %s: %d alerts so far", alert.step, alert.kind, count)
