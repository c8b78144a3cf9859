"""Self-influence: samples that move the model by themselves."""

from __future__ import annotations

import numpy as np

from diffhook.analysis.self_influence import SINGLE, self_influence
from diffhook.analysis.signals.signal import Found, Signal, View, flagged, register
from diffhook.analysis.signals.visits import NOTABLE
from diffhook.analysis.standardize import robust_deviations, stand_out


class _SelfInfluence(Signal):
    method: str
    words: str
    projected = True

    def look(self, view: View) -> Found | None:
        ranking = self_influence(view.log, self.method, view.source, execution=view.execution)
        if all(SINGLE in given for given in ranking.reasons):
            return None
        scores = np.full(len(view.sample_ids), np.nan)
        with np.errstate(divide="ignore"):
            logs = np.log(ranking.scores)
        logs[~np.isfinite(logs)] = np.nan
        scores[np.searchsorted(view.sample_ids, ranking.sample_ids)] = robust_deviations(logs)
        return Found(
            scores,
            flagged(
                stand_out(scores, NOTABLE),
                self.title,
                lambda i: f"{self.title} {scores[i]:+.1f}σ",
                lambda _: self.words,
            ),
        )


@register
class TracInSelfInfluence(_SelfInfluence):
    """Robust deviations of log TracIn self-influence."""

    name = "tracin"
    title = "TracIn self-influence"
    meaning = "TracIn self-influence"
    method = "tracin"
    words = "moves the model by itself (TracIn self-influence)"


@register
class ReTracSelfInfluence(_SelfInfluence):
    """Robust deviations of log ReTrac self-influence: how much a sample's gradients agree with each other."""

    name = "retrac"
    title = "ReTrac self-influence"
    meaning = "ReTrac self-influence"
    method = "retrac"
    words = "its gradients agree among timesteps (ReTrac self-influence)"
