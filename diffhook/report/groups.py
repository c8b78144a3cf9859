"""Copies of one picture as groups, of which a curator keeps one."""

from __future__ import annotations

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from diffhook.analysis import Ranking
from diffhook.analysis.reason import Reason

COPIES = ("exact copy", "near copy")
"""Kinds of reasons that name copies."""


def copy_groups(ranking: Ranking) -> list[list[int]]:
    """Positions in a ranking of samples that are copies of each other, two or more in a group.

    Those that are surely copies come first, and in a group the sample that is least unusual: the one to keep.
    """
    place = {int(sample): i for i, sample in enumerate(ranking.sample_ids)}
    named = [
        (i, place[other])
        for i, flags in enumerate(ranking.flags)
        for reason in map(Reason.of, flags)
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
    sure = ranking.parts.get("duplicate", np.zeros(len(ranking)))
    return sorted(groups, key=lambda group: (-float(np.nan_to_num(sure[group]).max()), group))


def closeness(ranking: Ranking, group: list[int]) -> str:
    """How surely a group's members are copies, in a few words."""
    kinds = {Reason.of(flag).kind for i in group for flag in ranking.flags[i]}
    if "near copy" not in kinds:
        return "identical"
    apart = ranking.parts.get("duplicate", np.full(len(ranking), np.nan))[group]
    return f"next nearest {np.exp(np.nanmax(apart)):.1f} × as far" if np.isfinite(apart).any() else ""
