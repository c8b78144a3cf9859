"""Labels to compare: samples that another label may fit better, beside members of both that look alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from diffhook.analysis import Ranking
from diffhook.report.nearness import Nearest

TITLE = "labels to compare"

_LEAST = 1.0  # −log10 of a probability: one sound sample in ten, for a look decides
_MOST = 500
_MEMBERS = 3  # that show what a label means
_WORTH = 0.07  # of all samples: the strongest, below which most labels in doubt are right
_FIRST = 12, 60  # rows shown at least and at most before one asks for more


@dataclass(frozen=True)
class Doubts:
    """Positions are those of a ranking's samples.

    Attributes:
        positions: of the samples in doubt, strongest first.
        own, better: of each of them the label and the one that may fit better, as positions in ``labels``.
        labels: their names.
        members: of each sample in doubt a few members of both labels, of those without a reason to look:
            those whose pictures are nearest to its own, or else typical ones.
        strengths: of each, in words.
        first: how many of them are worth judging at first.
        share: of all samples, which those are, in words.
    """

    positions: list[int]
    own: list[int]
    better: list[int]
    labels: list[str]
    members: list[tuple[list[int], list[int]]]
    strengths: list[str]
    first: int
    share: str

    def data(self) -> dict[str, Any]:
        return {"title": TITLE, **vars(self)}


def find_doubts(ranking: Ranking, nearest: Nearest | None = None) -> Doubts | None:
    """None where labels are not known, or all seem right.

    Args:
        nearest: finds the pictures that look like a sample's.
    """
    known = ranking.labels
    if known is None or "label" not in ranking.signals:
        return None
    scores = ranking.signals["label"]
    order = np.argsort(-np.nan_to_num(scores, nan=-np.inf), kind="stable")[:_MOST]
    listed = [i for i in order.tolist() if scores[i] > _LEAST and known.own[i] and known.better[i]]
    if not listed:
        return None
    names = sorted({known.own[i] for i in listed} | {known.better[i] for i in listed})
    number = {name: i for i, name in enumerate(names)}
    first = min(max(round(_WORTH * len(ranking)), _FIRST[0]), _FIRST[1], len(listed))
    sound = np.array([not given for given in ranking.reasons])
    sound[listed[:first]] = False
    shown = _Members(np.array(known.own), sound, scores, nearest)
    return Doubts(
        listed,
        [number[known.own[i]] for i in listed],
        [number[known.better[i]] for i in listed],
        [name.strip("'") for name in names],
        [(shown.of(i, known.own[i]), shown.of(i, known.better[i])) for i in listed],
        [_strength(scores[i]) for i in listed],
        first,
        f"{first / len(ranking):.0%}",
    )


def _strength(score: float) -> str:
    """From −log10 of a probability."""
    return f"1 in {min(10**score, 1e6):,.0f}"


class _Members:
    """Sound members of labels, to set beside a sample.

    Args:
        own: (N,) labels.
        sound: (N,) of whom there is nothing to say.
        scores: (N,) the larger, the worse a sample's label fits.
    """

    def __init__(
        self,
        own: npt.NDArray[np.str_],
        sound: npt.NDArray[np.bool_],
        scores: npt.NDArray[np.float64],
        nearest: Nearest | None,
    ) -> None:
        self._scores, self._nearest = scores, nearest
        self._of = {name: np.flatnonzero((own == name) & sound) for name in np.unique(own).tolist()}

    def of(self, i: int, label: str) -> list[int]:
        """Those nearest to a sample, or typical ones where no picture tells which these are."""
        among = self._of.get(label, np.array([], np.intp))
        return (self._nearest and self._nearest.of(i, among, _MEMBERS)) or self._typical(among)

    def _typical(self, among: npt.NDArray[np.intp]) -> list[int]:
        """Spread over the half that the label fits best: the very best are often siblings."""
        ordered = among[np.argsort(self._scores[among], kind="stable")]
        half = ordered[: max(len(ordered) // 2, _MEMBERS)]
        chosen = np.linspace(0, len(half) - 1, min(_MEMBERS, len(half))).astype(int)
        return [int(i) for i in half[chosen]]
