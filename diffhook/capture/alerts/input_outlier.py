"""A sample that looks unlike the others, whatever the model makes of it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from diffhook.capture.alerts.alert import Alert, about_row
from diffhook.capture.alerts.detector import DEFAULT_RATE, Detector, register
from diffhook.capture.alerts.tail import Tail
from diffhook.capture.appearance import FIGURES
from diffhook.log import Rows

Values = npt.NDArray[np.float64]

_FIRST, _MOST = 64, 4096  # rows seen before the first is judged; rows remembered
_CLIP = 3.0  # deviations beyond it tell nothing of how figures go together
_NORMAL = 1.2816  # where a standard normal has its outer tenths


@register("input-outlier")
class InputOutlier(Detector):
    """Names samples whose pixels (or latents) are unlike the others', from their first visit on.

    A sample's mean, the log of its contrast and that of its roughness are set against those of the rows
    before: each as deviations from the median, in spreads of that side of it, and together as Mahalanobis's
    distance under the correlation of deviations clipped at 3, which broken samples cannot bend. How far is
    too far is learned from the run. Unlike gradient and loss these figures do not depend on timestep or
    noise, so that one visit tells. Rows of batches whose clean samples are not known are passed over. The
    log holds no figures: in a resumed run the detector warms up again.
    """

    def __init__(self, rate: float = DEFAULT_RATE) -> None:
        super().__init__(rate)
        self._tail = Tail(rate)
        self._memory: Values = np.empty((0, len(FIGURES)))

    def look(self, rows: Rows) -> Iterator[Alert]:
        if "appearance" not in rows:
            return
        shown = rows["appearance"].astype(float)
        with np.errstate(invalid="ignore"):
            figures = np.concatenate([shown[:, :1], np.log(np.maximum(shown[:, 1:], 1e-6))], 1)
        deviations, distances = self._compare(figures)
        level = self._tail.level
        for index in np.flatnonzero(self._tail.alarms(distances)):
            figure = int(np.abs(deviations[index]).argmax())
            message = (
                f"{self.who(rows['sample'][index])} looks unlike the others: "
                f"{self._words(figure, figures[index, figure], shown[index, figure])} "
                f"(distance {distances[index]:.1f}; one row in {1 / self.rate:,.0f} reaches {level:.1f})"
            )
            yield about_row(self.kind, rows, int(index), float(distances[index]), level, message)
        self._memory = np.concatenate([self._memory, figures[np.isfinite(figures).all(1)]])[-_MOST:]

    def _compare(self, figures: Values) -> tuple[Values, Values]:
        """(rows, figures) deviations and (rows,) distances; NaN where a row or the past has no numbers."""
        if len(self._memory) < _FIRST:
            return np.full(figures.shape, np.nan), np.full(len(figures), np.nan)
        low, middle, high = np.quantile(self._memory, [0.1, 0.5, 0.9], axis=0)
        spreads = np.maximum(np.stack([middle - low, high - middle]) / _NORMAL, 1e-6)

        def deviations(values: Values) -> Values:
            return (values - middle) / np.where(values < middle, *spreads)

        usual = np.clip(deviations(self._memory), -_CLIP, _CLIP)
        together = usual.T @ usual / len(usual) + 1e-3 * np.eye(len(FIGURES))
        found = deviations(figures)
        squares = (found * np.linalg.solve(together, found.T).T).sum(1)
        return found, np.sqrt(squares)

    def _words(self, figure: int, value: float, shown: float) -> str:
        low, high = np.quantile(self._memory[:, figure], [0.01, 0.99])
        if low <= value <= high:
            return f"its {', '.join(FIGURES[:-1])} and {FIGURES[-1]} do not go together as theirs do"
        low, high = (low, high) if figure == 0 else np.exp([low, high])
        return f"its {FIGURES[figure]} is {shown:.3g}, that of 98% of them {low:.3g} to {high:.3g}"
