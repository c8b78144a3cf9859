"""Copies of one picture as groups, of which a curator keeps one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from diffhook.analysis import Ranking
from diffhook.analysis.reason import Reason
from diffhook.report.nearness import changed_share

COPIES = ("exact copy", "near copy")
"""Kinds of reasons that name copies."""

_THROUGHOUT = 0.5  # of the pixels: more than this differs in a picture that was saved again
_MUCH = 2.0  # times as far as the copy is the next picture, from which on they are much more alike


def copy_groups(ranking: Ranking) -> list[list[int]]:
    """Positions in a ranking of samples that are copies of each other, two or more in a group.

    Those that are surely copies come first, and in a group the sample that is least unusual: the one to keep.
    """
    place = {int(sample): i for i, sample in enumerate(ranking.sample_ids)}
    named = [
        (i, place[other])
        for i, given in enumerate(ranking.reasons)
        for reason in map(Reason.of, given)
        if reason.kind in COPIES
        for other in reason.others
        if place.get(other, i) != i
    ]
    if not named:
        return []
    left, right = np.array(named).T
    links = coo_array((np.ones(len(left)), (left, right)), (len(ranking), len(ranking)))
    _, labels = connected_components(links, directed=False)
    members = np.unique(np.concatenate([left, right]))
    groups = [members[labels[members] == label][::-1].tolist() for label in np.unique(labels[members])]
    sure = ranking.signals.get("duplicate", np.zeros(len(ranking)))
    return sorted(groups, key=lambda group: (-float(np.nan_to_num(sure[group]).max()), group))


@dataclass(frozen=True)
class CopyGroup:
    """Samples that are copies of each other.

    Attributes:
        members: as :func:`copy_groups` has them.
        closeness: how alike they are, in a few words.
        variant: their pictures differ in one place only, as those of one motif do: rarely one to leave out.
    """

    members: list[int]
    closeness: str
    variant: bool


def compared_groups(ranking: Ranking, pictures: Mapping[int, Image.Image]) -> list[CopyGroup]:
    """In the order of :func:`copy_groups`, but variants last.

    Args:
        pictures: sample id → picture in RGBA, of those that have one.
    """
    return sorted(
        (_compared(ranking, members, pictures) for members in copy_groups(ranking)),
        key=lambda group: group.variant,
    )


def _compared(ranking: Ranking, members: list[int], pictures: Mapping[int, Image.Image]) -> CopyGroup:
    if "near copy" not in {Reason.of(given).kind for i in members for given in ranking.reasons[i]}:
        return CopyGroup(members, "identical", variant=False)
    share = _changed(ranking, members, pictures)
    if share is None:
        return CopyGroup(members, _apart(ranking, members), variant=False)
    if share < _THROUGHOUT:
        return CopyGroup(members, f"differ in {share:.0%} of the picture", variant=True)
    return CopyGroup(members, "differ slightly throughout", variant=False)


def _changed(ranking: Ranking, members: list[int], pictures: Mapping[int, Image.Image]) -> float | None:
    """The largest share of pixels in which a member differs from the first; None where no picture tells."""
    first, *others = (pictures.get(int(ranking.sample_ids[i])) for i in members)
    known = [] if first is None else [changed_share(first, other) for other in others if other is not None]
    return max(known, default=None)


def _apart(ranking: Ranking, members: list[int]) -> str:
    ratios = ranking.signals.get("duplicate", np.full(len(ranking), np.nan))[members]
    if not np.isfinite(ratios).any():
        return ""
    much = "much " if np.exp(np.nanmax(ratios)) > _MUCH else ""
    return f"{much}more alike than any other pair"
