"""What is said when a newer hook of the same process takes over, as where a notebook's cell is run again."""

from __future__ import annotations

import logging

from diffhook.capture.recording.recorder import Recorder

logger = logging.getLogger("diffhook")

_TAKEN_OVER = "a newer hook of this process has taken over from the one that logged to %s"


class Succession:
    """Tells the earlier hook: when it gives way, and once more where it is used all the same."""

    def __init__(self) -> None:
        self._place = ""  # of its log, if it gave way and that is still to be told

    def gave_way(self, place: object, recorder: Recorder | None, failure: Exception | None) -> None:
        """The earlier hook has ended its log.

        Args:
            place: of the log.
            recorder: that it had; None: no row was captured.
            failure: what kept the last rows from being written.
        """
        self._place = str(place)
        if recorder is not None:
            kept = "all its rows are kept" if failure is None else f"its last rows are lost: {failure}"
            logger.warning(_TAKEN_OVER + ", which captures nothing more; %s", place, kept)

    def used(self) -> None:
        """The loop goes on with a hook that is closed."""
        if self._place:
            logger.warning(_TAKEN_OVER + ": what the earlier one is given now is not logged", self._place)
            self._place = ""
