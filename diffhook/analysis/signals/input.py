"""What the sample itself looks like, whatever the model makes of it."""

from __future__ import annotations

import numpy as np

from diffhook.analysis.signals.signal import Found, Signal, View, flagged, register
from diffhook.analysis.standardize import robust_deviations
from diffhook.analysis.tables import appearance_table
from diffhook.appearance import COLUMNS, ReferenceStatistics, on_scale

_FEWEST = 16  # samples of which one can say what is usual
_FAR = 6.0  # robust deviations: distances have a longer tail than a normal's


@register
class Input(Signal):
    """Distance of a sample's mean, contrast and roughness from those of the others; see
    :class:`~diffhook.appearance.ReferenceStatistics`. Means over its visits, for augmentation may differ."""

    name = "input"
    title = "look"
    meaning = "mean, contrast and roughness of the sample itself"
    counted_on = frozenset({"train", "probe"})

    def look(self, view: View) -> Found | None:
        table = appearance_table(view.log)  # knows, whatever is ranked
        if table is None:
            return None
        means = [view.means(table, column)[0] for column in COLUMNS]
        statistics = on_scale(np.column_stack(means))
        known = np.isfinite(statistics).all(1)
        if known.sum() < _FEWEST:
            return None
        usual = ReferenceStatistics(statistics[known])
        distances = usual.distances(statistics)
        far = np.nan_to_num(robust_deviations(distances)) > _FAR
        return Found(
            distances,
            flagged(
                far,
                "unusual look",
                lambda i: f"{usual.brief(statistics[i])}",
                lambda i: f"looks unlike the others: {usual.words(statistics[i])}",
            ),
        )
