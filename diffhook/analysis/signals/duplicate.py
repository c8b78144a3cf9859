"""Near-duplicates: samples whose gradients on the grid point the same way, and whose pixels agree."""

from __future__ import annotations

import numpy as np

from diffhook.analysis.duplicates import nearest_neighbours
from diffhook.analysis.pixels import ALIKE, correlation
from diffhook.analysis.signals.signal import Found, Signal, View, flagged, register
from diffhook.analysis.standardize import robust_deviations
from diffhook.log.samples import sample_words, short_names

CLOSE = 0.9  # cosine
_SAME = 1e-6  # 1 − cosine, of float16 projections of one gradient
_FAR = 4.0  # robust deviations: in some runs most samples' gradients are near another's


@register
class Duplicate(Signal):
    """Cosine to the nearest other sample. Told beside the score: what occurs twice is no outlier for that.

    A pair is called a near-duplicate only on the grid, where all gradients are of the same noise, and only
    where the log's thumbnails of both show the same.
    """

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
        scores = found.cosines.astype(float)
        if view.source != "probe":  # events of one sample are as far apart as those of two
            return Found(scores, {})
        names, thumbnails = view.log.names(), view.log.thumbnails
        alike = {
            int(i): correlation(thumbnails, int(found.sample_ids[i]), int(found.neighbours[i]))
            for i in np.flatnonzero(close)
        }
        twins = np.array([close[i] and (alike[i] or 0) >= ALIKE for i in range(len(close))])
        return Found(
            scores,
            flagged(
                twins,
                "near-duplicate",
                lambda i: f"like {sample_words(int(found.neighbours[i]), short_names(names))}",
                lambda i: (
                    f"near-duplicate of sample {sample_words(int(found.neighbours[i]), names)}: cosine of "
                    f"gradients {found.cosines[i]:.2f}, correlation of pixels {alike[i]:.2f}"
                ),
            ),
        )
