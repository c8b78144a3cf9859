"""Labels to compare: samples that another label may fit better, beside typical members of both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from diffhook.analysis import Ranking

TITLE = "labels to compare"

_LEAST = 1.0  # −log10 of a probability: one sound sample in ten, for a look decides
_MOST = 500
_TYPICAL = 3  # members that show what a label means


@dataclass(frozen=True)
class Doubts:
    """Positions are those of a ranking's samples.

    Attributes:
        positions: of the samples in doubt, strongest first.
        own, better: of each of them the label and the one that may fit better, as positions in ``labels``.
        labels: their names.
        typical: of each label a few members that it fits well, of those without a reason to look.
    """

    positions: list[int]
    own: list[int]
    better: list[int]
    labels: list[str]
    typical: list[list[int]]

    def data(self) -> dict[str, Any]:
        return {"title": TITLE, **vars(self)}


def find_doubts(ranking: Ranking) -> Doubts | None:
    """None where labels are not known, or all seem right."""
    known = ranking.labels
    if known is None or "label" not in ranking.parts:
        return None
    scores = ranking.parts["label"]
    order = np.argsort(-np.nan_to_num(scores, nan=-np.inf), kind="stable")[:_MOST]
    listed = [i for i in order.tolist() if scores[i] > _LEAST and known.own[i] and known.better[i]]
    if not listed:
        return None
    names = sorted({known.own[i] for i in listed} | {known.better[i] for i in listed})
    number = {name: i for i, name in enumerate(names)}
    own = np.array(known.own)
    sound = np.array([not flags for flags in ranking.flags])
    return Doubts(
        listed,
        [number[known.own[i]] for i in listed],
        [number[known.better[i]] for i in listed],
        [name.strip("'") for name in names],
        [_typical(np.flatnonzero((own == name) & sound), scores) for name in names],
    )


def _typical(members: npt.NDArray[np.intp], scores: npt.NDArray[np.float64]) -> list[int]:
    """Spread over the half that the label fits best: the very best are often siblings."""
    ordered = members[np.argsort(scores[members], kind="stable")]
    half = ordered[: max(len(ordered) // 2, _TYPICAL)]
    chosen = np.linspace(0, len(half) - 1, min(_TYPICAL, len(half))).astype(int)
    return [int(i) for i in half[chosen]]
