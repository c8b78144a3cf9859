"""Samples that seem to be of another class than their label says, or to have another's caption."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from diffhook.analysis.class_names import class_names
from diffhook.analysis.label_neighbours import label_neighbours
from diffhook.analysis.reason import Reason
from diffhook.analysis.signals.signal import Floats, Found, Signal, View, register
from diffhook.analysis.standardize import robust_deviations
from diffhook.words import one_line

_FAR = 2.0  # robust deviations: losses under other labels have a short upper tail, unless the label is wrong

Integers = npt.NDArray[np.int64]


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
            return Found(contrasts, _by_loss(view, contrasts))
        if view.labels is None or not view.table.dim:
            return None
        nearer, others = label_neighbours(view.table, view.labels, view.execution)
        reasons = {}
        for i in np.flatnonzero(_stand_out(nearer)).tolist():
            own, other = (one_line(str(each)) for each in (view.labels[int(view.sample_ids[i])], others[i]))
            words = (
                f"labelled {own!r}; its gradients are nearer to those of {other!r} (cosine +{nearer[i]:.2f})"
            )
            reasons[i] = _reason(words, other)
        return Found(nearer, reasons)

    def _contrasts(self, view: View) -> Floats | None:
        """(N,); None where no probe tried labels."""
        if not any("label_contrast" in group.columns for group in view.log.probe.groups):
            return None
        means, counts = view.means(view.log.probe, "label_contrast")
        return means if counts.any() else None


def _by_loss(view: View, contrasts: Floats) -> dict[int, Reason]:
    own, better = _classes(view)
    called = class_names(
        dict(zip(view.sample_ids.tolist(), own.tolist(), strict=True)), view.labels, view.log
    )
    reasons = {}
    for i in np.flatnonzero(_stand_out(contrasts)).tolist():
        less = f"loss {1 - np.exp(-contrasts[i]):.0%} less"
        if better[i] < 0:
            reasons[i] = _reason(
                f"the model fits another label or caption better than its own ({less})", "another"
            )
            continue
        mine, other = called(int(own[i])), called(int(better[i]))
        reasons[i] = _reason(f"labelled {mine}; the model fits {other} better ({less})", other)
    return reasons


def _reason(sentence: str, other: str) -> Reason:
    return Reason(sentence, "wrong label", f"rather {other}?")


def _classes(view: View) -> tuple[Integers, Integers]:
    """(N,) each: the class that the model was told, and the one that fitted better at the last snapshot; −1
    where the log does not say."""
    table = view.log.probe
    own, better = np.full((2, len(view.sample_ids)), -1)
    for block in table.blocks():  # in the order of the snapshots
        rows = {name: table.read(block, name) for name in ("sample", "label", "better_label")}
        known = np.isin(rows["sample"], view.sample_ids) & (rows["better_label"] >= 0)
        at = np.searchsorted(view.sample_ids, rows["sample"][known])
        own[at], better[at] = rows["label"][known], rows["better_label"][known]
    return own, better


def _stand_out(scores: Floats) -> npt.NDArray[np.bool_]:
    far: npt.NDArray[np.bool_] = np.nan_to_num(robust_deviations(scores)) > _FAR
    return far & (np.nan_to_num(scores) > 0)
