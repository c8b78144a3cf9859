"""The loss among those at the same timestep."""

from __future__ import annotations

import numpy as np

from diffhook.analysis.signals.norm import NOTABLE
from diffhook.analysis.signals.signal import Found, Signal, View, flagged, register
from diffhook.analysis.standardize import standardized


@register
class Loss(Signal):
    """Mean over visits of the log loss's robust residual, within timestep bin and stage of training."""

    name = "loss"
    meaning = "loss standardised within timestep bins"

    def look(self, view: View) -> Found | None:
        residual = standardized(view.table, "loss")
        usable = np.isfinite(residual)
        if not usable.any():
            return None
        scores = view.mean(residual)
        high = view.visits(usable & (np.nan_to_num(residual) > NOTABLE)).astype(int)
        seen = view.visits(usable).astype(int)
        reasons = flagged(
            high > 0, lambda i: f"loss far above its timestep's on {high[i]} of {seen[i]} visits"
        )
        return Found(scores, reasons)
