"""The loss among those at the same timestep."""

from __future__ import annotations

from diffhook.analysis.signals.signal import Found, Signal, View, flagged, register


@register
class Loss(Signal):
    """Mean over visits of the log loss's robust residual, within timestep bin and stage of training."""

    name = "loss"
    meaning = "loss standardised within timestep bins"

    def look(self, view: View) -> Found | None:
        high, seen = view.losses.notable.astype(int), view.losses.seen.astype(int)
        if not seen.any():
            return None
        reasons = flagged(
            high > 0, lambda i: f"loss far above its timestep's on {high[i]} of {seen[i]} visits"
        )
        return Found(view.losses.mean, reasons)
