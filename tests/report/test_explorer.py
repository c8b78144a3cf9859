"""What the page's map and facets are given: every sample's picture, place and values."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import diffhook
from diffhook.analysis.execution import Execution
from diffhook.analysis.ranking import Labels, Ranking
from diffhook.analysis.reason import Reason
from diffhook.log import RunLog
from diffhook.report.atlas import make_atlas, small_pictures
from diffhook.report.doubts import find_doubts
from diffhook.report.explorer import Explorer
from diffhook.report.facets import Facet, alerts, folders, reasons, visits
from diffhook.report.groups import compared_groups
from diffhook.report.nearness import Nearest
from tests.report.conftest import SAMPLES
from tests.report.logs import photographs, write_log


def _sheet(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")


@pytest.mark.parametrize(("count", "side"), [(5, 16), (40, 96), (3000, 8)])
def test_each_cell_of_the_atlas_is_its_samples_picture(count: int, side: int) -> None:
    pixels = photographs(count, side)
    atlas = make_atlas(small_pictures(lambda sample: pixels[sample % count], range(count)))
    assert atlas is not None
    sheet = np.asarray(_sheet(atlas.uri), float)
    rng = np.random.default_rng(0)
    for sample in rng.choice(count, min(count, 30), replace=False).tolist():
        row, column = divmod(atlas.places[sample], atlas.columns)
        cell = sheet[row * atlas.cell :, column * atlas.cell :][: atlas.cell, : atlas.cell]
        margin = (atlas.cell - min(side, atlas.cell)) // 2
        inner = cell[margin : atlas.cell - margin, margin : atlas.cell - margin]
        picture = Image.fromarray(pixels[sample]).resize(inner.shape[1::-1], Image.Resampling.LANCZOS)
        assert np.abs(inner - np.asarray(picture, float)).mean() < 12, "another sample's picture"


def test_pictures_that_cannot_be_read_have_no_cell() -> None:
    def images(sample: int) -> Any:
        if sample == 1:
            raise OSError("torn")
        return None if sample == 2 else photographs(1, 8)[0]

    atlas = make_atlas(small_pictures(images, range(4)))
    assert atlas is not None
    assert set(atlas.places) == {0, 3}
    assert make_atlas(small_pictures(lambda sample: None, range(4))) is None
    assert make_atlas(small_pictures(None, range(4))) is None


def test_ten_thousand_pictures_fit_into_a_page() -> None:
    rng = np.random.default_rng(0)
    pixels = photographs(200, 96)
    pick = rng.integers(0, 200, 10_000)
    atlas = make_atlas(
        small_pictures(lambda sample: np.roll(pixels[pick[sample]], sample % 96, axis=1), range(10_000))
    )
    assert atlas is not None
    assert atlas.cell == 48
    assert len(atlas.uri) < 12e6


def test_pictures_that_compress_badly_are_kept_more_coarsely(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (300, 64, 64, 3), np.uint8)
    fine = make_atlas(small_pictures(noise.__getitem__, range(300)))
    assert fine is not None
    monkeypatch.setattr("diffhook.report.atlas._BYTES", len(fine.uri) // 2)
    coarse = make_atlas(small_pictures(noise.__getitem__, range(300)))
    assert coarse is not None
    assert len(coarse.uri) * 3 / 4 <= len(fine.uri) // 2
    assert (coarse.cell, coarse.places) == (fine.cell, fine.places)


def test_every_sample_has_a_value_in_each_facet_and_is_counted_once_for_each() -> None:
    facet = Facet.most_common_first("x", "X", [["a"], ["b", "a", "b"], [], ["a"]])
    assert facet.values == ("a", "b", "none")
    assert facet.of == ((0,), (1, 0), (2,), (0,))
    assert facet.counts == [3, 1, 1]


def test_too_many_values_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffhook.report.facets._MOST", 2)
    facet = Facet.most_common_first("x", "X", [["a"], ["a"], ["b"], ["b"], ["c"], ["d"], []])
    assert facet.values == ("a", "b", "2 others", "none")
    assert facet.counts == [2, 2, 2, 1]


def test_facets_are_what_the_log_says() -> None:
    kinds = reasons([(Reason("a", "high norm", "b"), Reason("c", "high loss", "c")), (), ("plain",)])
    assert kinds.values == ("high loss", "note", "none", "high norm"), "as one acts on them"
    assert kinds.folded == 1
    assert kinds.of == ((3, 0), (2,), (1,))
    found = folders([1, 2, 3], {1: "/d/cat/new/1.png", 2: "/d/dog/2.png", 3: "/d/3.png"})
    assert found is not None
    assert found.values == ("cat", "dog", "none")
    raised = [{"kind": "norm", "samples": [5, 6]}, {"kind": "drift"}, {"kind": "norm", "samples": [5]}]
    assert alerts([5, 6, 7], raised).of == ((0,), (0,), (1,))


def test_labels_in_doubt_are_one_kind_and_typical_members_are_sound() -> None:
    rng = np.random.default_rng(0)
    scores = rng.uniform(-1, 0.9, 40)
    scores[[3, 8]] = 3.0, 1.5
    wrong = Reason("labelled a", "wrong label", "rather b?")
    flags = tuple((wrong,) if i == 3 else (("odd",) if i in (4, 6) else ()) for i in range(40))
    own = tuple("'a'" if i % 2 else "'b'" for i in range(40))
    better = tuple("'b'" if i % 2 else "'a'" for i in range(40))
    ranking = Ranking(np.arange(40), scores, flags, "", {"label": scores}, labels=Labels(own, better))
    doubts = find_doubts(ranking)
    assert doubts is not None
    assert doubts.positions == [3, 8], "strongest first"
    assert [doubts.labels[n] for n in doubts.own] == ["a", "b"]
    assert [doubts.labels[n] for n in doubts.better] == ["b", "a"]
    for labels, pair in zip(zip(doubts.own, doubts.better, strict=True), doubts.members, strict=True):
        for label, members in zip(labels, pair, strict=True):
            name = f"'{doubts.labels[label]}'"
            assert {own[i] for i in members} == {name}
            assert not {3, 4, 6, 8} & set(members)
            assert scores[members].max() <= np.median(scores[[i for i in range(40) if own[i] == name]])
    assert doubts.strengths == ["1 in 1,000", "1 in 32"]
    kinds = reasons(flags, {*doubts.positions})
    assert kinds.values == ("labels to compare", "note", "none")
    assert [i for i, of in enumerate(kinds.of) if 0 in of] == [3, 8]
    assert find_doubts(replace(ranking, labels=None)) is None


def test_the_members_beside_a_sample_are_those_that_look_like_it() -> None:
    own = tuple("a" if i < 20 else "b" for i in range(40))
    scores = np.full(40, -1.0)
    scores[0] = 3.0
    grey = {i: np.full((8, 8, 3), 6 * i, np.uint8) for i in range(40)}
    pictures = small_pictures(grey.get, range(40))
    ranking = Ranking(np.arange(40), scores, ((),) * 40, "", {"label": scores}, labels=Labels(own, own[::-1]))
    doubts = find_doubts(ranking, Nearest(pictures, ranking.sample_ids))
    assert doubts is not None
    assert doubts.members == [([1, 2, 3], [20, 21, 22])]
    without = {i: picture for i, picture in pictures.items() if i}
    typical = find_doubts(ranking, Nearest(without, ranking.sample_ids))
    assert typical == find_doubts(ranking), "typical ones where it has no picture itself"


def test_variants_that_differ_in_one_place_come_after_files_saved_again() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(40, 200, (3, 16, 16, 3)).astype(np.uint8).repeat(2, axis=0)
    pixels[1, :4, :4] += 20  # a variant, though it is the closest pair
    pixels[3] = pixels[3] + rng.integers(2, 30, pixels[3].shape).astype(np.uint8)
    kinds = ("near copy", "near copy", "exact copy")
    flags = tuple((Reason("", kinds[i // 2], "", (i ^ 1,)),) for i in range(6))
    sure = np.repeat([2.0, 1.0, 6.0], 2)
    ranking = Ranking(np.arange(6), np.arange(6, 0, -1.0), flags, "", {"duplicate": sure})
    found = compared_groups(ranking, small_pictures(pixels.__getitem__, range(6)))
    assert [(group.members, group.closeness, group.variant) for group in found] == [
        ([5, 4], "identical", False),
        ([3, 2], "differ slightly throughout", False),
        ([1, 0], "differ in 6% of the picture", True),
    ]
    told = [group.closeness for group in compared_groups(ranking, {})]
    assert told == ["identical", *["much more alike than any other pair"] * 2]


@pytest.mark.parametrize("seen", [np.array([0, 1, 1, 3]), np.arange(100), np.array([*[1] * 50, *range(20)])])
def test_ranges_of_visits_hold_each_sample(seen: np.ndarray) -> None:
    facet = visits(seen)
    for value, (position,) in zip(seen.tolist(), facet.of, strict=True):
        low, _, high = facet.values[position].replace("never", "0").partition(" – ")
        assert int(low) <= value <= int(high or low)


@pytest.fixture(scope="module")
def explorer(log: RunLog) -> Explorer:
    pixels = photographs(SAMPLES, 16)
    ranking = diffhook.outliers(log)
    return Explorer.make(log, ranking, lambda s: pixels[s], "train", None, Execution())


def test_columns_are_in_the_order_of_the_ranking(log: RunLog, explorer: Explorer) -> None:
    ranking, data = diffhook.outliers(log), explorer.data()
    assert data["ids"] == ranking.sample_ids.tolist()
    assert {len(data[name]) for name in ("names", "listed", "scores", "cells")} == {SAMPLES}
    assert [len(side) for side in data["places"]] == [SAMPLES] * 2
    assert all(0 <= place <= 10_000 for side in data["places"] for place in side)
    for keys, values in zip(data["keys"], ranking.signals.values(), strict=True):
        order = np.argsort(-np.nan_to_num(values, nan=-np.inf), kind="stable")
        known = [key if key is not None else np.inf for key in keys]
        assert np.all(np.diff(np.array(known)[order]) >= 0), "ascending keys are descending values"
    for i, flags in enumerate(ranking.reasons):
        assert [sentence for _, sentence in data["reasons"].get(str(i), [])] == list(flags)


def test_the_sample_without_a_gradient_stands_at_the_lower_edge(explorer: Explorer) -> None:
    assert explorer.homeless == 1
    broken = explorer.ranking.sample_ids.tolist().index(7)
    assert explorer.places is not None
    assert explorer.places[broken, 1] > np.delete(explorer.places[:, 1], broken).max()


def test_copies_lie_side_by_side(explorer: Explorer) -> None:
    together = replace(explorer, places=np.full((SAMPLES, 2), 0.5)).data()["places"]
    places = np.array(together).T
    assert len(np.unique(places, axis=0)) == SAMPLES
    assert np.abs(places - 5000).max() <= np.ceil(np.sqrt(SAMPLES) / 2)
    assert places[0].tolist() == [5000, 5000], "the first of the ranking stays"
    apart = explorer.data()["places"]
    assert np.abs(np.array(apart).T - explorer.places * 10_000).max() <= 2.5


def test_facets_of_a_log_are_its_own(explorer: Explorer, log: RunLog) -> None:
    found = {facet.name: facet for facet in explorer.facets}
    assert set(found) == {"reason", "alert"}, "what does not divide them is not offered"
    alerted = {int(sample) for alert in log.alerts() for sample in alert["samples"]}
    none = found["alert"].values.index("none")
    assert {
        int(s) for s, of in zip(explorer.ranking.sample_ids, found["alert"].of, strict=True) if none not in of
    } == alerted


def test_labels_are_a_facet_where_they_are_known(log: RunLog) -> None:
    labels = {sample: ("cat", "dog")[sample % 2] for sample in range(SAMPLES)}
    found = Explorer.make(log, diffhook.outliers(log), None, "train", labels, Execution())
    (facet,) = [facet for facet in found.facets if facet.name == "label"]
    for sample, (value,) in zip(found.ranking.sample_ids.tolist(), facet.of, strict=True):
        assert facet.values[value] == labels[sample]


def test_norms_alone_make_no_map(tmp_path: Path, log: RunLog, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffhook.errors import LogError

    def refuse(*_: Any, **__: Any) -> Any:
        raise LogError("norms only")

    monkeypatch.setattr("diffhook.report.explorer.source_table", refuse)
    found = Explorer.make(log, diffhook.outliers(log), None, "train", None, Execution())
    assert found.places is None
    assert found.data()["places"] is None
    assert found.facets


def test_visits_are_counted_in_the_trainings_rows(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", 30, 3)
    ids, counts = np.unique(log.train["sample"], return_counts=True)
    found = Explorer.make(log, diffhook.outliers(log), None, "train", None, Execution())
    facet = next(facet for facet in found.facets if facet.name == "visits")
    for sample, (value,) in zip(found.ranking.sample_ids, facet.of, strict=True):
        assert facet.values[value] == str(counts[ids == sample][0])
