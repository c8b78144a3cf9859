"""A sample that looks unlike the others, whatever the model makes of it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from diffhook.appearance import COLUMNS, STATISTICS, ReferenceStatistics, Values, on_scale
from diffhook.capture.alerts.alert import Alert, about_row
from diffhook.capture.alerts.detector import DEFAULT_RATE, Detector, register
from diffhook.capture.alerts.tail import Tail
from diffhook.log import Rows

_FIRST, _MOST = 64, 4096  # rows seen before the first is judged; rows remembered


@register
class InputOutlier(Detector):
    """Names samples whose pixels (or latents) are unlike the others', from their first visit on.

    A sample's mean, contrast and roughness are set against those of the rows before, see
    :class:`~diffhook.appearance.ReferenceStatistics`. How far is too far is learned from the run.
    Unlike gradient and loss these do not depend on timestep or noise, so that one visit tells. Rows of
    batches whose clean samples are not known are passed over.
    """

    kind = "input-outlier"

    def __init__(self, rate: float = DEFAULT_RATE) -> None:
        super().__init__(rate)
        self._tail = Tail(rate)
        self._memory: Values = np.empty((0, len(STATISTICS)))

    def look(self, rows: Rows) -> Iterator[Alert]:
        if not rows.keys() >= set(COLUMNS):
            return
        statistics = on_scale(np.column_stack([rows[column] for column in COLUMNS]))
        if len(self._memory) >= _FIRST:
            yield from self._judge(rows, statistics)
        self._memory = np.concatenate([self._memory, statistics[np.isfinite(statistics).all(1)]])[-_MOST:]

    def _judge(self, rows: Rows, statistics: Values) -> Iterator[Alert]:
        usual = ReferenceStatistics(self._memory)
        distances = usual.distances(statistics)
        level = self._tail.level
        for index in np.flatnonzero(self._tail.alarms(distances)):
            why = usual.words(statistics[index])
            message = (
                f"{self.who(rows['sample'][index])} looks unlike the others: {why} "
                f"(distance {distances[index]:.1f}; one row in {1 / self.rate:,.0f} reaches {level:.1f})"
            )
            yield about_row(self.kind, rows, int(index), float(distances[index]), level, message)
