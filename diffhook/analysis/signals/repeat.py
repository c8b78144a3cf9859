"""Samples that are among the highest norms again and again."""

from __future__ import annotations

import numpy as np
import scipy.stats

from diffhook.analysis.signals.signal import Found, Signal, View, flagged, register
from diffhook.analysis.signals.visits import HIGH_SHARE

_NOTABLE = 3.0  # −log10 of a probability


@register
class Repeat(Signal):
    """−log10 of the chance to be among the highest tenth so often, were visits independent and alike."""

    name = "repeat"
    title = "repeated offences"
    meaning = "among the highest tenth of norms at its timestep, more often than chance"

    def look(self, view: View) -> Found:
        high, seen = view.norms.high.astype(int), view.norms.seen.astype(int)
        scores = -scipy.stats.binom.logsf(high - 1, seen, HIGH_SHARE) / np.log(10)
        reasons = flagged(
            (scores > _NOTABLE) & (high > 1),
            "high norm",
            lambda i: f"norm high {high[i]} of {seen[i]} times",
            lambda i: f"repeated: among the highest tenth of norms on {high[i]} of {seen[i]} visits",
        )
        return Found(np.where(seen > 0, scores, np.nan), reasons)
