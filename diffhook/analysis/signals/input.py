"""What the sample itself looks like, whatever the model makes of it."""

from __future__ import annotations

from functools import partial

import numpy as np
import numpy.typing as npt

from diffhook.analysis.grouped import Plan, grouped
from diffhook.analysis.samples import SampleMeans, Whole
from diffhook.analysis.signals.signal import Found, Signal, View, flagged, register
from diffhook.analysis.standardize import robust_deviations
from diffhook.log import Block, Table
from diffhook.looks import COLUMNS, Usual, Values, on_scale

_FEWEST = 16  # samples of which one can say what is usual
_FAR = 6.0  # robust deviations: distances have a longer tail than a normal's


@register
class Input(Signal):
    """Distance of a sample's mean, contrast and roughness from those of the others; see
    :class:`~diffhook.looks.Usual`. Means over its visits, which augmentation may change."""

    name = "input"
    meaning = "mean, contrast and roughness of the sample itself"

    def look(self, view: View) -> Found | None:
        figures = on_scale(np.column_stack([self._means(view, column) for column in COLUMNS]))
        known = np.isfinite(figures).all(1)
        if known.sum() < _FEWEST:
            return None
        usual = Usual(figures[known])
        distances = usual.distances(figures)
        far = np.nan_to_num(robust_deviations(distances)) > _FAR
        return Found(distances, flagged(far, lambda i: f"looks unlike the others: {usual.words(figures[i])}"))

    def _means(self, view: View, column: str) -> Values:
        """(N,); NaN where no visit knows it. The training's rows know, whatever is ranked."""
        means = SampleMeans(view.sample_ids, partial(_column, name=column))
        plan = Plan.make(len(view.sample_ids), 2, view.execution)
        sums = grouped(view.log.train, means, plan, Whole(), view.execution, f"reading {column}")
        with np.errstate(invalid="ignore"):
            found: Values = sums[:, 0] / sums[:, 1]
        return found


def _column(table: Table, block: Block, name: str) -> npt.NDArray[np.floating]:
    return table.read(block, name)
