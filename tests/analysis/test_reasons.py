"""Reasons: the order in which one acts on them, and none that is weak or absurd."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from diffhook.analysis.reason import KINDS, Reason
from diffhook.analysis.signals.visits import VisitCounts, often
from diffhook.appearance import ReferenceStatistics, on_scale


def test_what_a_look_decides_comes_first_and_weak_reasons_only_where_there_is_no_other() -> None:
    given = [Reason("…", kind, kind) for kind in ("high norm", "wrong label", "high loss")]
    assert [reason.kind for reason in Reason.telling(given)] == ["high loss", "wrong label"]
    assert [reason.kind for reason in Reason.telling([given[0]])] == ["high norm"]
    assert Reason.telling(["a note of one's own", given[0]]) == ["a note of one's own"]
    assert [Reason("…", kind, kind).place for kind in KINDS] == list(range(len(KINDS)))


def test_a_reason_survives_a_pickle() -> None:
    reason = pickle.loads(pickle.dumps(Reason("words", "near copy", "brief", (3, 5))))
    assert (reason, reason.kind, reason.brief, reason.others) == ("words", "near copy", "brief", (3, 5))


@pytest.mark.parametrize(("mean", "notable", "told"), [(0.6, 2, False), (2.5, 2, True), (2.5, 1, False)])
def test_a_sample_that_is_not_high_on_average_is_not_flagged(mean: float, notable: int, told: bool) -> None:
    columns = (np.array([float(value)]) for value in (8, mean, notable, notable, 0))
    assert often(VisitCounts(*columns)).tolist() == [told]


def test_a_sample_without_texture_is_told_so_and_not_in_deviations() -> None:
    seen = on_scale(np.random.default_rng(0).normal([0.5, 0.3, 0.1], 0.01, (200, 3)))
    usual = ReferenceStatistics(seen)
    (flat,), (smooth,), (dim,) = (on_scale(np.array([each])) for each in (
        [0.5, 0.0, 0.0], [0.5, 0.3, 0.0], [0.3, 0.3, 0.1]))  # fmt: skip
    assert (usual.brief(flat), usual.words(flat)) == ("a single colour only", "it has a single colour only")
    assert usual.brief(smooth) == "no texture at all"
    assert usual.brief(dim) == "extremely dark", "92.8 deviations tell no more"
