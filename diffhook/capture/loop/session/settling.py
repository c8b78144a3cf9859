"""Sees rows to the disk where a checkpoint is written: a process killed later resumes from it."""

from __future__ import annotations

import logging
import time

from diffhook.capture.loop.run.ranks import Ranks
from diffhook.capture.loop.session.session import CaptureSession

logger = logging.getLogger("diffhook")

_BETWEEN = 20  # times what it took at the loop's last checkpoint, before it is waited for again …
_SOON = 2  # … and before it is begun again


class Settling:
    """Waits for the rows of one process, or of all.

    Args:
        session: whose rows they are.

    Attributes:
        ranks: the run's processes, while rows are being logged.
    """

    def __init__(self, session: CaptureSession) -> None:
        self._session = session
        self.ranks: Ranks | None = None
        self._lasted = 0.0, 0.0  # when it began and ended

    def own(self, step: int = 0) -> bool:
        """See this process's rows to disk, unless not all ``step`` steps have been taken."""
        recorder, count = self._session.recorder, self._session.steps.count
        if recorder is not None and count >= step:
            recorder.settle()
        return count >= step

    def everyone(self) -> None:
        """See the rows of every process to disk; the first one's to ask."""
        began, count = time.perf_counter(), self._session.steps.count
        self.own(count)
        late = [] if self.ranks is None else self.ranks.settle_all(count)
        if late:
            logger.warning("rows of ranks %s before this checkpoint may not be on disk yet", late)
        self._lasted = began, time.perf_counter()

    def optimizer_saved(self) -> None:
        """The optimiser's state was asked for: the loop writes a checkpoint of its own.

        Some loops ask for it every step, and wait a twentieth of the time.
        """
        session, recorder = self._session, self._session.recorder
        if recorder is None or session.steps.inside or not session.thread.is_here:
            return
        began, ended = self._lasted
        left = (time.perf_counter() - ended) / max(ended - began, 1e-9)
        if left > _SOON:
            session.settle_held()
        if left > _BETWEEN:
            self.everyone()
        elif left > _SOON:
            recorder.settle(wait=False)
            if self.ranks is not None:
                self.ranks.settle_all(session.steps.count, wait=False)
