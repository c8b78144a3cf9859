"""One process's alerts while it trains: rows in; log, sinks and quarantine out."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from diffhook.capture.alerts.alert import Alert
from diffhook.capture.alerts.delivery import Delivery
from diffhook.capture.alerts.detector import Detector
from diffhook.capture.alerts.deviation import Deviations
from diffhook.capture.alerts.limit import Limit
from diffhook.capture.alerts.quarantine import Quarantine
from diffhook.capture.alerts.replay import replayed_steps
from diffhook.capture.alerts.settings import Alerts
from diffhook.capture.alerts.throttle import Factors, Throttle
from diffhook.log import Rows, RunLog
from diffhook.words import one_line

logger = logging.getLogger("diffhook")


class Watch:
    """Feeds rows to detectors, and what they find to the log, the sinks and the quarantine.

    Args:
        alerts: the user's wishes; a sequence is one of detectors, None is the usual.
        write: takes an alert as JSON, to the log.
        read: gives the alerts of all processes so far, from the log.
        rank: this process.
        strict: raise what a detector raises; otherwise it is told, and the detector left out from then on.

    Attributes:
        factors: what the throttle has learned from the rows; None: it is off, or has failed.
    """

    def __init__(
        self,
        alerts: Alerts | Sequence[Detector] | None,
        write: Callable[[Mapping[str, Any]], None],
        read: Callable[[], list[dict[str, Any]]],
        rank: int,
        strict: bool = False,
    ) -> None:
        settled = Alerts.of(alerts)
        self.detectors = list(settled.detectors or ())
        self._strict = strict
        shared = Deviations()
        for detector in self.detectors:
            detector.deviations = shared
        self.factors = Factors(settled.throttle, shared) if isinstance(settled.throttle, Throttle) else None
        self.rank = rank
        self.kinds: list[str] = []  # of the alerts told
        self._write = write
        self._limit = Limit(settled.most)
        self._delivery = Delivery(settled.sinks or (), settled.timeout)
        self._quarantine = settled.quarantine if isinstance(settled.quarantine, Quarantine) else None
        if self._quarantine is not None:
            self._quarantine.bind(self._tell, read, rank)

    def know(self, names: Mapping[int, str]) -> None:
        """What samples are called in messages: id → name; may grow."""
        for detector in self.detectors:
            detector.names = names
        if self._quarantine is not None:
            self._quarantine.names = names
        if self.factors is not None:
            self.factors.names = names

    def look(self, rows: Rows, layer: str | None = None) -> None:
        """Judge the rows of one optimiser step.

        Args:
            rows: scalar columns.
            layer: of the step's gradients that are not finite, the first in backward order.
        """
        if self._quarantine is not None:
            self._quarantine.step = int(rows["step"][0])
        for found in self._found(rows):
            alert = self._limit.admit(found)
            if alert is None:
                continue
            if layer is not None and alert.kind == "non-finite":
                alert = replace(
                    alert, layer=layer, message=f"{alert.message} (first in backward order: {layer})"
                )
            self._tell(alert)
            if self._quarantine is not None:
                self._quarantine.hear(alert)
        for record in self._throttled(rows):
            self._tell(record)

    def _found(self, rows: Rows) -> Iterator[Alert]:
        for detector in list(self.detectors):
            try:
                yield from list(detector.look(rows))
            except Exception as error:
                if self._strict:
                    raise
                self.detectors.remove(detector)
                logger.error(
                    "the detector %s failed and is left out from now on: %s: %s",
                    detector.kind, type(error).__name__, error, exc_info=error,
                )  # fmt: skip

    def _throttled(self, rows: Rows) -> list[Alert]:
        try:
            return [] if self.factors is None else list(self.factors.look(rows))
        except Exception as error:
            if self._strict:
                raise
            self.factors = None
            logger.error(
                "the throttle failed, and all samples count in full from now on: %s: %s",
                type(error).__name__, error, exc_info=error,
            )  # fmt: skip
            return []

    def resume(self, log: RunLog) -> None:
        """Learn what this process had learned: look at its last rows again, and tell nothing twice.

        Raises:
            LogError: the log is damaged.
        """
        for rows in replayed_steps(log, self.rank) if self.detectors or self.factors else ():
            for _ in self._found(rows):
                pass
            self._throttled(rows)
        own = [alert for alert in log.alerts() if alert.get("rank", 0) == self.rank]
        for alert in own:
            self._limit.remember(alert["kind"], alert["samples"], alert["step"])
        if self.factors is not None:
            self.factors.restore(own)

    def close(self) -> None:
        """Let the sinks finish; their threads end. Idempotent."""
        self._delivery.close()
        for kind, count in Counter(self._limit.held_back).items():
            logger.warning("%d more alerts of the kind %s were held back: too many at once", count, kind)
        self._limit.held_back.clear()

    def _tell(self, alert: Alert) -> None:
        message = one_line(alert.message)
        alert = replace(alert, message=message, rank=self.rank, time=time.time())
        self._write(alert.to_json())
        self._delivery.send(alert)
        self.kinds.append(alert.kind)
