"""The gradient's norm among those at the same timestep."""

from __future__ import annotations

import numpy as np

from diffhook.analysis.signals.signal import Found, Signal, View, flagged, register

NOTABLE = 3.0  # robust standard deviations


@register
class Norm(Signal):
    """Mean over visits of (log norm − median) / (1.4826 · MAD), within timestep bin and stage of training."""

    name = "norm"
    meaning = "gradient norm standardised within timestep bins"

    def look(self, view: View) -> Found:
        usable = np.isfinite(view.norms)
        high = view.visits(usable & (np.nan_to_num(view.norms) > NOTABLE)).astype(int)
        seen = view.visits(usable).astype(int)
        reasons = flagged(
            high > 0, lambda i: f"norm far above its timestep's on {high[i]} of {seen[i]} visits"
        )
        return Found(view.mean(view.norms), reasons)
