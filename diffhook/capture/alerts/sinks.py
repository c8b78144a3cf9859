"""The sink that needs nobody else: Python's logging."""

from __future__ import annotations

import logging

from diffhook.capture.alerts.alert import Alert

logger = logging.getLogger("diffhook")

_LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def to_logging(alert: Alert) -> None:
    """One record of the logger "diffhook"."""
    logger.log(_LEVELS[alert.level], "step %d: %s", alert.step, alert.message)
