"""Near-duplicates: samples whose gradients point the same way, confirmed by pixels where the log has them."""

from __future__ import annotations

import numpy as np

from diffhook.analysis.duplicates import nearest_neighbours
from diffhook.analysis.pixels import ALIKE, correlation
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
        names, thumbnails = view.log.names(), view.log.thumbnails

        def reason(index: int) -> str:
            other = int(found.neighbours[index])
            alike = correlation(thumbnails, int(found.sample_ids[index]), other)
            of_gradients = f"gradients like sample {sample_words(other, names)}'s"
            return f"{of_gradients} (cosine {found.cosines[index]:.2f}){_verdict(alike)}"

        return Found(found.cosines.astype(float), flagged(close, reason))


def _verdict(alike: float | None) -> str:
    """What the pixels say to it."""
    if alike is None:
        return ": near-duplicate?"
    if alike >= ALIKE:
        return f", and pixels too (correlation {alike:.2f}): near-duplicate"
    return f", but not the pixels (correlation {alike:.2f}): alike to the model only"
