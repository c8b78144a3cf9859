"""What is not in the log, and why: told where it first happens, counted to the end."""

from __future__ import annotations

import logging
from collections import Counter

logger = logging.getLogger("diffhook")


class Absences:
    """Counts micro-batches that were left out, by reason, and tells each reason once."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()  #: kind → micro-batches
        self._told: set[str] = set()

    def leave_out(self, kind: str, reason: str, *found: object) -> None:
        """A micro-batch is not captured.

        Args:
            kind: of the reason, such as "several-rows"; each kind is told once.
            reason: what was found and what to do, in words; with ``found`` for its %-placeholders.
        """
        self.count(kind)
        self.tell(kind, reason, *found)

    def count(self, kind: str, micro_batches: int = 1) -> None:
        """So many are not captured, which is told elsewhere, or is the loop's own doing."""
        self.counts[kind] += micro_batches

    def leave_out_rows(self, rows: int, count: int) -> None:
        """The model sees another number of rows than there are ids: wrong rows would be worse than none."""
        if rows % count:
            self.leave_out(
                "other-rows",
                "the batch has %d sample ids, but the model was called on %d rows, and it is not known which "
                "rows are whose: such steps are not captured. Name the rows with "
                "hook.step(sample_ids=..., timesteps=...)",
                count,
                rows,
            )
            return
        self.leave_out(
            "several-rows",
            "the model was called on %d rows for %d sample ids, and it is not known which rows are whose: "
            "such steps are not captured. Name every row with hook.step(sample_ids=...): "
            "ids.repeat_interleave(%d) where a sample's rows follow one another, ids.repeat(%d) where whole "
            "batches do",
            rows,
            count,
            rows // count,
            rows // count,
        )

    def tell(self, kind: str, reason: str, *found: object) -> None:
        """Say once what is true of many steps."""
        if kind not in self._told:
            self._told.add(kind)
            logger.warning(reason, *found)
