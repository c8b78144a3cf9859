"""The loss among those at the same timestep."""

from __future__ import annotations

import numpy as np

from diffhook.analysis.signals.signal import Floats, Found, Signal, View, flagged, register
from diffhook.analysis.signals.visits import NOTABLE, often
from diffhook.analysis.standardize import stand_out


@register
class Loss(Signal):
    """On a grid, where all samples are at the same timesteps, the log of the mean loss. Of events, the mean
    over visits of the log loss's robust residual, within timestep bin and stage of training."""

    name = "loss"
    title = "loss"
    meaning = "loss, standardised within timestep bins unless it is of a grid"
    counted_on = frozenset({"train", "probe"})

    def look(self, view: View) -> Found | None:
        high, seen = view.losses.notable.astype(int), view.losses.seen.astype(int)
        if not seen.any():
            return None
        on_grid = self._of_grid(view) if view.source == "probe" else None
        if on_grid is not None:
            times = np.exp(on_grid - np.nanmedian(on_grid))
            return Found(
                on_grid,
                flagged(
                    stand_out(on_grid, NOTABLE),
                    "high loss",
                    lambda i: f"loss × {times[i]:.2g}",
                    lambda i: f"mean loss {times[i]:.2g} times the typical sample's",
                ),
            )
        reasons = flagged(
            often(view.losses),
            "high loss",
            lambda i: f"loss {view.losses.mean[i]:+.1f}σ",
            lambda i: f"loss far above its timestep's on {high[i]} of {seen[i]} visits",
        )
        return Found(view.losses.mean, reasons)

    def _of_grid(self, view: View) -> Floats | None:
        """(N,) log of the mean loss; None where not all samples were on all of the grid."""
        means, counts = view.means(view.table, "loss")
        if (counts != counts[0]).any():
            return None
        return np.log(means, out=np.full(len(means), np.nan), where=means > 0)
