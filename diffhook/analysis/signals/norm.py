"""The gradient's norm among those at the same timestep."""

from __future__ import annotations

from diffhook.analysis.signals.signal import Found, Signal, View, flagged, register
from diffhook.analysis.signals.visits import often


@register
class Norm(Signal):
    """Mean over visits of (log norm − median) / (1.4826 · MAD), within timestep bin and stage of training."""

    name = "norm"
    title = "gradient norm"
    meaning = "gradient norm standardised within timestep bins"
    counted_on = frozenset({"train"})

    def look(self, view: View) -> Found:
        high, seen = view.norms.notable.astype(int), view.norms.seen.astype(int)
        scores = view.norms.mean
        reasons = flagged(
            often(high, seen),
            "norm",
            lambda i: f"norm {scores[i]:+.1f}σ",
            lambda i: f"norm far above its timestep's on {high[i]} of {seen[i]} visits",
        )
        return Found(scores, reasons)
