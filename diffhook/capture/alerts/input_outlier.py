"""A sample that looks unlike the others, whatever the model makes of it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from diffhook.capture.alerts.alert import Alert, about_row
from diffhook.capture.alerts.detector import DEFAULT_RATE, Detector, register
from diffhook.capture.alerts.tail import Tail
from diffhook.log import Rows
from diffhook.looks import COLUMNS, FIGURES, Usual, Values, on_scale

_FIRST, _MOST = 64, 4096  # rows seen before the first is judged; rows remembered


@register
class InputOutlier(Detector):
    """Names samples whose pixels (or latents) are unlike the others', from their first visit on.

    A sample's mean, contrast and roughness are set against those of the rows before, see
    :class:`~diffhook.looks.Usual`. How far is too far is learned from the run. Unlike gradient and loss these
    figures do not depend on timestep or noise, so that one visit tells. Rows of batches whose clean samples
    are not known are passed over.
    """

    kind = "input-outlier"

    def __init__(self, rate: float = DEFAULT_RATE) -> None:
        super().__init__(rate)
        self._tail = Tail(rate)
        self._memory: Values = np.empty((0, len(FIGURES)))

    def look(self, rows: Rows) -> Iterator[Alert]:
        if not rows.keys() >= set(COLUMNS):
            return
        figures = on_scale(np.column_stack([rows[column] for column in COLUMNS]))
        if len(self._memory) >= _FIRST:
            yield from self._judge(rows, figures)
        self._memory = np.concatenate([self._memory, figures[np.isfinite(figures).all(1)]])[-_MOST:]

    def _judge(self, rows: Rows, figures: Values) -> Iterator[Alert]:
        usual = Usual(self._memory)
        distances = usual.distances(figures)
        level = self._tail.level
        for index in np.flatnonzero(self._tail.alarms(distances)):
            message = (
                f"{self.who(rows['sample'][index])} looks unlike the others: {usual.words(figures[index])} "
                f"(distance {distances[index]:.1f}; one row in {1 / self.rate:,.0f} reaches {level:.1f})"
            )
            yield about_row(self.kind, rows, int(index), float(distances[index]), level, message)
