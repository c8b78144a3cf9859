"""The loss among those at the same timestep."""

from __future__ import annotations

import numpy as np

from diffhook.analysis.signals.signal import Floats, Found, Signal, View, flagged, register


@register
class Loss(Signal):
    """On a grid, where all samples are at the same timesteps, the log of the mean loss. Of events, the mean
    over visits of the log loss's robust residual, within timestep bin and stage of training."""

    name = "loss"
    meaning = "loss, standardised within timestep bins unless it is of a grid"

    def look(self, view: View) -> Found | None:
        high, seen = view.losses.notable.astype(int), view.losses.seen.astype(int)
        if not seen.any():
            return None
        reasons = flagged(
            high > 0, lambda i: f"loss far above its timestep's on {high[i]} of {seen[i]} visits"
        )
        return Found(self._of_grid(view) if view.source == "probe" else view.losses.mean, reasons)

    def _of_grid(self, view: View) -> Floats:
        means, counts = view.means(view.table, "loss")
        if (counts != counts[0]).any():  # not all were on all of it
            return view.losses.mean
        return np.log(means, out=np.full(len(means), np.nan), where=means > 0)
