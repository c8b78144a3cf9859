"""Samples that seem to be of another class than their label says, or to have another's caption."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from diffhook.analysis.label_neighbours import label_neighbours
from diffhook.analysis.signals.signal import Floats, Found, Signal, View, flagged, register
from diffhook.analysis.signals.visits import NOTABLE
from diffhook.analysis.standardize import robust_deviations


@register
class Label(Signal):
    """Of probes that tried other labels or captions: log loss under the own − log of the smallest under
    another, mean over snapshots. Of other logs, where the labels are given: how much nearer, in cosine, the
    nearest samples of another label are than those of the same. Stands beside the score: mixed in, it is
    drowned."""

    name = "label"
    title = "another label fits better"
    meaning = "loss under the sample's own label or caption against that under others, or neighbours' labels"

    def look(self, view: View) -> Found | None:
        contrasts = self._contrasts(view)
        if contrasts is not None:
            words = "denoised better under another label or caption than its own (loss {:.0%} less): wrong?"
            reasons = flagged(
                _stand_out(contrasts),
                "wrong label?",
                lambda i: f"other label fits {1 - np.exp(-contrasts[i]):.0%} better",
                lambda i: words.format(1 - np.exp(-contrasts[i])),
            )
            return Found(contrasts, reasons)
        if view.labels is None or not view.table.dim:
            return None
        nearer = label_neighbours(view.table, view.labels, view.execution)
        words = "gradients nearer to those of samples with another label (cosine +{:.2f}): wrong label?"
        return Found(
            nearer,
            flagged(
                _stand_out(nearer),
                "wrong label?",
                lambda i: f"other label +{nearer[i]:.2f}",
                lambda i: words.format(nearer[i]),
            ),
        )

    def _contrasts(self, view: View) -> Floats | None:
        """(N,); None where no probe tried labels."""
        if not any("label_contrast" in group.columns for group in view.log.probe.groups):
            return None
        means, counts = view.means(view.log.probe, "label_contrast")
        return means if counts.any() else None


def _stand_out(scores: Floats) -> npt.NDArray[np.bool_]:
    far: npt.NDArray[np.bool_] = np.nan_to_num(robust_deviations(scores)) > NOTABLE
    return far & (np.nan_to_num(scores) > 0)
