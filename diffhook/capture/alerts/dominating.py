"""One sample that decides a whole step."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from diffhook.capture.alerts.alert import Alert, about_row
from diffhook.capture.alerts.detector import DEFAULT_RATE, Detector, register
from diffhook.capture.alerts.tail import Tail
from diffhook.log import Rows

_FEWEST = 4  # rows in a step, for a share of them to mean something


@register
class Dominating(Detector):
    """Names the sample that holds most of its batch's squared gradient norm.

    Small timesteps have large norms and often lead a batch, so a share above ``share`` alarms only
    where the run's own steps exceed it no more often than ``rate``.

    Args:
        rate: alarms per step on a clean run.
        share: of the sum of squared norms of the rows that this process saw in the step.
    """

    kind = "dominating"

    def __init__(self, rate: float = DEFAULT_RATE, share: float = 0.5) -> None:
        super().__init__(rate)
        self.share = share
        self._tail = Tail(rate)

    def look(self, rows: Rows) -> Iterator[Alert]:
        squares = np.square(rows["grad_norm"].astype(float))
        total = float(squares.sum())
        if len(squares) < _FEWEST or not np.isfinite(total) or total <= 0:
            return
        first = int(squares.argmax())
        share = squares[first] / total
        odds = np.log(squares[first]) - np.log(max(total - squares[first], 1e-300))
        level = 1 / (1 + np.exp(-self._tail.level))
        if not self._tail.alarms(np.array([odds]))[0] or share <= self.share:
            return
        yield about_row(
            self.kind,
            rows,
            first,
            float(share),
            max(float(level), self.share),
            f"{self.who(rows['sample'][first])} holds {share:.0%} of the squared gradient norm of "
            f"a step of {len(squares)} samples: it alone decides where the step goes",
        )
