"""Near-duplicates: samples whose gradients point the same way."""

from __future__ import annotations

import numpy as np

from diffhook.analysis.duplicates import nearest_neighbours
from diffhook.analysis.signals.signal import Found, Signal, View, flagged, register
from diffhook.analysis.standardize import robust_deviations
from diffhook.log.samples import sample_words

CLOSE = 0.9  # cosine
_SAME = 1e-6  # 1 − cosine, of float16 projections of one gradient
_FAR = 4.0  # robust deviations: in some runs most samples' gradients are near another's


@register
class Duplicate(Signal):
    """Cosine to the nearest other sample. Told beside the score: what occurs twice is no outlier for that."""

    name = "duplicate"
    title = "nearness to another sample"
    meaning = "cosine of aggregated projections with the nearest other sample"
    ranks = False
    projected = True
    pairwise = True

    def look(self, view: View) -> Found | None:
        if len(view.sample_ids) < 2:
            return None
        found = nearest_neighbours(view.table, view.execution)
        near = -np.log(np.maximum(1 - found.cosines, _SAME))
        close = (found.cosines > CLOSE) & (np.nan_to_num(robust_deviations(near)) > _FAR)
        words, names = "gradients like sample {}'s (cosine {:.2f}): near-duplicate?", view.log.names()

        def reason(index: int) -> str:
            return words.format(sample_words(found.neighbours[index], names), found.cosines[index])

        reasons = flagged(close, reason)
        return Found(found.cosines.astype(float), reasons)
