"""The samples that together made a query, against every removal computed by itself in float64."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

import diffhook
from diffhook.analysis.methods import whitening
from diffhook.errors import ConfigurationError
from tests.analysis.formulas import RIDGE, directions_by_time, each_row, moment, nearest_step
from tests.analysis.synthetic import SAMPLES, STEPS, TIMES, Rows, Synthetic, synthetic

home = import_module("diffhook.analysis.influential_subset")


def asking(asked: Rows, query: int, step: int, timestep: float, *, near: bool) -> np.ndarray:
    """A query's direction, as a row at a timestep is set against it."""
    by_time = np.array(directions_by_time(asked, query, step, "whitened-retrac", [0]))
    if not near:
        return by_time.mean(0)
    centres = np.linspace(TIMES[0], TIMES[-1], 8)
    centre = min(centres, key=lambda c: (abs(c - timestep), c))
    shares = np.exp(-(((np.array(TIMES) - centre) / (centres[1] - centres[0])) ** 2) / 2)
    return shares @ by_time / shares.sum()


def effect(rows: Rows, asked: Rows, query: int, gone: Sequence[int], parts: list[slice], near: bool) -> float:
    """mean_k φ_q λ (G_S + λI)⁻¹ Σ_{i in S} φ_i, of G's diagonal blocks; rows of the same sample, snapshot and
    timestep are taken from it by their mean."""
    each = [(g / np.linalg.norm(g), s, nearest_step(k), t) for g, s, k, t, _ in each_row(rows)]
    gram = moment(rows)
    ridge = RIDGE["whitened-retrac"]
    total = 0.0
    together: dict[tuple[int, int, float], list[np.ndarray]] = {}
    for unit, *place in each:
        together.setdefault(tuple(place), []).append(unit)
    for part in parts:
        whole = gram[part, part]
        means = [(len(units), np.mean(units, 0)[part]) for (s, _, _), units in together.items() if s in gone]
        left = whole - sum(n * np.outer(mean, mean) for n, mean in means) / len(each)
        inverse = np.linalg.inv(left + ridge * np.trace(whole) / len(whole) * np.eye(len(whole)))
        for unit, sample, step, timestep in each:
            if sample in gone:
                count = sum((s, k) == (sample, step) for _, s, k, _ in each)
                direction = asking(asked, query, step, timestep, near=near)
                total += direction[part] @ inverse @ unit[part] / count / len(STEPS)
    return total * ridge * np.trace(gram) / len(gram)


def chosen(rows: Rows, asked: Rows, query: int, k: int, parts: list[slice], near: bool) -> list[int]:
    gone: list[int] = []
    for _ in range(k):
        others = [i for i in SAMPLES.tolist() if i not in gone]
        gone.append(max(others, key=lambda i: effect(rows, asked, query, [*gone, i], parts, near)))
    return gone


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Synthetic:
    return synthetic(tmp_path_factory.mktemp("subset") / "log", replicates=1, shared=1.0)


@pytest.mark.parametrize("source", ["probe", "train"])
@pytest.mark.parametrize("width", [4096, 10])
def test_each_is_what_costs_the_query_most_without_those_before_it(
    made: Synthetic, source: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(home, "_BINS", 100)  # none but equal timesteps are taken together
    monkeypatch.setattr(whitening, "BLOCK", width)
    found = diffhook.influential_subset(made.log, "new", 3, source)
    rows, asked, near = getattr(made, source), made.queries["new"], source == "train"
    parts = whitening.blocks(24)
    for query, ids, effects in zip(range(4), found.sample_ids, found.scores.cumsum(1), strict=True):
        assert ids.tolist() == chosen(rows, asked, query, 3, parts, near)
        direct = [effect(rows, asked, query, ids[: n + 1].tolist(), parts, near) for n in range(3)]
        np.testing.assert_allclose(effects, direct, rtol=1e-4)
    np.testing.assert_allclose(found.effects, found.scores.sum(1))


def test_copies_are_chosen_together(tmp_path: Path) -> None:
    """Alone each is worth little, for the other one stays."""
    made = synthetic(tmp_path / "log", replicates=1)
    found = diffhook.influential_subset(made.log, "twins", 2, "probe")
    assert found.sample_ids[:, 0].tolist() == [2, 3]
    assert (found.scores > 0).all()


def test_queries_in_groups_and_pools_of_all_samples_give_the_same(made: Synthetic) -> None:
    whole = diffhook.influential_subset(made.log, "new", 3, "probe")
    little = diffhook.influential_subset(
        made.log, "new", 3, "probe", pool=len(SAMPLES), execution=diffhook.Execution(memory=1 << 16)
    )
    np.testing.assert_array_equal(whole.sample_ids, little.sample_ids)
    np.testing.assert_allclose(whole.scores, little.scores, rtol=1e-5)
    assert diffhook.influential_subset(made.log, "new", 9, "probe").sample_ids.shape == (4, len(SAMPLES))


def test_rows_of_neighbouring_timesteps_are_taken_together(
    made: Synthetic, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Less is left out of G then than there is, so that effects are smaller, and the order much the same."""
    found = []
    for bins in (100, 2):
        monkeypatch.setattr(home, "_BINS", bins)
        found.append(diffhook.influential_subset(made.log, "new", 7, "train").scores.ravel())
    assert np.corrcoef(*found)[0, 1] > 0.5
    assert (found[0] != found[1]).any()


def test_a_sample_is_taken_from_a_matrix_that_holds_all_of_it(
    made: Synthetic, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where scores make do with a share of the rows, in which a sample may be missing."""
    whole = diffhook.influential_subset(made.log, "new", 3, "train")
    monkeypatch.setattr("diffhook.analysis.second_moment.ROWS", 10)
    found = diffhook.influential_subset(made.log, "new", 3, "train")
    np.testing.assert_array_equal(found.sample_ids, whole.sample_ids)
    np.testing.assert_allclose(found.scores, whole.scores, rtol=1e-5)


def test_wrong_sizes_are_told(made: Synthetic) -> None:
    with pytest.raises(ConfigurationError, match="k is 0; expected at least 1"):
        diffhook.influential_subset(made.log, "new", 0)
    with pytest.raises(ConfigurationError, match="pool is 2; expected at least 3"):
        diffhook.influential_subset(made.log, "new", 3, pool=2)


def test_it_is_shown(made: Synthetic) -> None:
    found = diffhook.influential_subset(made.log, "new", 3)
    assert repr(found).startswith("Subsets of 3 for 4 queries")
    assert "Subsets of 3 for each query" in (found._repr_html_() or "")
