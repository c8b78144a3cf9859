"""What the sample itself looks like, whatever the model makes of it."""

from __future__ import annotations

import numpy as np

from diffhook.analysis.signals.signal import Found, Signal, View, flagged, register
from diffhook.analysis.standardize import robust_deviations
from diffhook.looks import COLUMNS, Usual, on_scale

_FEWEST = 16  # samples of which one can say what is usual
_FAR = 6.0  # robust deviations: distances have a longer tail than a normal's


@register
class Input(Signal):
    """Distance of a sample's mean, contrast and roughness from those of the others; see
    :class:`~diffhook.looks.Usual`. Means over its visits, which augmentation may change."""

    name = "input"
    title = "look"
    meaning = "mean, contrast and roughness of the sample itself"
    counted_on = frozenset({"train", "probe"})

    def look(self, view: View) -> Found | None:
        train = view.log.train  # knows, whatever is ranked
        if not any(group.columns >= set(COLUMNS) for group in train.groups):
            return None
        means = [view.means(train, column)[0] for column in COLUMNS]
        figures = on_scale(np.column_stack(means))
        known = np.isfinite(figures).all(1)
        if known.sum() < _FEWEST:
            return None
        usual = Usual(figures[known])
        distances = usual.distances(figures)
        far = np.nan_to_num(robust_deviations(distances)) > _FAR
        return Found(
            distances,
            flagged(
                far,
                "unusual look",
                lambda i: f"{usual.brief(figures[i])}",
                lambda i: f"looks unlike the others: {usual.words(figures[i])}",
            ),
        )
