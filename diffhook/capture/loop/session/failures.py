"""What an exception of ours costs: a micro-batch, the capture, or with ``strict`` the training."""

from __future__ import annotations

import logging
from typing import Literal

from diffhook.errors import CaptureError, ConfigurationError, DiffHookError, LogError, LogUnavailableError

logger = logging.getLogger("diffhook")

IN_A_ROW = 20
"""Failures without a captured micro-batch between them after which the capture ends."""

Verdict = Literal["go on", "stop", "raise"]


def reason_of(error: Exception) -> str:
    """Under which micro-batches that an exception of ours has cost are counted."""
    cause = error.__cause__ if isinstance(error, CaptureError) else None
    return f"error: {type(cause or error).__name__}"


class Failures:
    """Judges and tells exceptions of ours.

    Args:
        strict: raise all of them.

    Attributes:
        started: rows are being captured: from now on nothing of ours may stop the training.
    """

    def __init__(self, strict: bool) -> None:
        self.started = False
        self._strict = strict
        self._in_a_row = 0
        self._captured = 0
        self._told: set[tuple[str, str]] = set()

    def judge(self, error: Exception, captured: int) -> Verdict:
        """What to do about an exception.

        Args:
            captured: micro-batches captured so far.
        """
        # Bad use is told before the first step, while nothing is lost by stopping there.
        away = isinstance(error, LogUnavailableError)
        bad_use = isinstance(error, ConfigurationError | LogError) and not (away or self.started)
        if self._strict or bad_use:
            return "raise"
        self._in_a_row = self._in_a_row + 1 if captured == self._captured else 1
        self._captured = captured
        stop = (isinstance(error, LogError) and not away) or self._in_a_row >= IN_A_ROW
        self._tell(error, stop)
        return "stop" if stop else "go on"

    def _tell(self, error: Exception, stop: bool) -> None:
        kind = type(error).__name__, str(error)
        told = isinstance(error, DiffHookError) and error.told
        if stop:
            logger.log(
                logging.INFO if told else logging.ERROR,
                "diffhook has stopped capturing; training goes on. %s: %s",
                *kind,
                exc_info=None if told or isinstance(error, DiffHookError) else error,
            )
        elif kind not in self._told:
            self._told.add(kind)
            logger.error(
                "diffhook left out a micro-batch and tries the next; training goes on. %s: %s",
                *kind,
                exc_info=None if isinstance(error, DiffHookError) else error,
            )
