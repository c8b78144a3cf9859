"""Alerts on their way out: each sink has a thread of its own, and training waits for none."""

from __future__ import annotations

import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from diffhook.capture.alerts.alert import Alert

logger = logging.getLogger("diffhook")

Sink = Callable[[Alert], None]
"""Takes one alert somewhere. Called in a thread of its own; may be slow, hang or raise."""

_QUEUED = 256  # alerts that wait for a slow sink; those beyond are dropped and counted
_LOWEST = 19  # priority of the sinks: the training comes first


class Delivery:
    """Hands alerts to sinks.

    Args:
        sinks: where they go.
        timeout: seconds after which a sink that has not returned is given up, and that
            :meth:`close` waits at most for all of them together.
    """

    def __init__(self, sinks: Sequence[Sink], timeout: float) -> None:
        self._outlets = [_Outlet(sink, timeout) for sink in sinks]
        self._timeout = timeout

    def send(self, alert: Alert) -> None:
        """Queue an alert for every sink. Never waits."""
        for outlet in self._outlets:
            outlet.send(alert)

    def close(self) -> None:
        """Let the sinks finish what is queued, within the timeout. Their threads end."""
        for outlet in self._outlets:
            outlet.finish()
        until = time.monotonic() + self._timeout
        for outlet in self._outlets:
            outlet.join(until)


class _Outlet:
    def __init__(self, sink: Sink, timeout: float) -> None:
        self.sink = sink
        self.name = getattr(sink, "__qualname__", type(sink).__qualname__)
        self.timeout = timeout
        self.dead = False
        self.lost = 0
        self.failing = False
        self._queue: queue.Queue[Alert | None] = queue.Queue(_QUEUED + 1)
        self._called: float | None = None  # when the call under way began
        self._thread: threading.Thread | None = None  # none before the first alert

    # ── called by the training process ────────────────────────────────────────────────────────

    def send(self, alert: Alert) -> None:
        called = self._called
        if not self.dead and called is not None and time.monotonic() - called > self.timeout:
            self._give_up()
        if self.dead or self._queue.qsize() >= _QUEUED:
            self.lost += 1
            return
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._work, name=f"diffhook-alerts-{self.name}", daemon=True
            )
            self._thread.start()
        self._queue.put_nowait(alert)

    def finish(self) -> None:
        if self._thread is not None and not self.dead:
            self._queue.put_nowait(None)

    def join(self, until: float) -> None:
        if self._thread is None:
            return
        if not self.dead:
            self._thread.join(max(until - time.monotonic(), 0))
            if self._thread.is_alive():
                self._give_up()
        self._thread = None
        if self.lost:
            logger.warning("%d alerts did not reach the sink %s; the log has them all", self.lost, self.name)

    def _give_up(self) -> None:
        self.dead = True
        self.lost += self._queue.qsize()
        logger.error(
            "the sink %s has not answered within %g s: alerts are no longer sent to it; the log has them all",
            self.name,
            self.timeout,
        )

    # ── the sink's thread ─────────────────────────────────────────────────────────────────────

    def _work(self) -> None:
        if sys.platform == "linux":  # where a thread has a priority of its own
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST)
        while (alert := self._queue.get()) is not None and not self.dead:
            self._called = time.monotonic()
            try:
                self.sink(alert)
                self.failing = False
            except Exception as error:
                self.lost += 1
                if not self.failing:  # once for each time that it begins to fail
                    logger.warning("the sink %s failed: %s: %s", self.name, type(error).__name__, error)
                self.failing = True
            finally:
                self._called = None
