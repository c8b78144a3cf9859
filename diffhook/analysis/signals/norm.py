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
        scores = view.norms.mean
        reasons = flagged(
            often(view.norms),
            "high norm",
            lambda i: f"norm {scores[i]:+.1f}σ",
            lambda i: f"gradient norm {scores[i]:.1f} deviations above its timesteps' usual, on average",
        )
        return Found(scores, reasons)
