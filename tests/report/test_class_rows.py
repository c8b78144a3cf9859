"""Prior preservation: a sample's class image is a row of its own, which a dataset does not know."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import diffhook
from diffhook.analysis import Ranking
from diffhook.analysis.evaluation import half_subsets, lds
from diffhook.capture import NonFinite
from diffhook.cli import main
from diffhook.log import LogWriter, RunLog, Snapshot, open_log
from diffhook.log.samples import ROLE_STRIDE, sample_words
from diffhook.report import find_images, write_page
from diffhook.report.parts.outliers import outliers_part
from diffhook.report.thumbnails import PictureCache
from tests.report.logs import CONFIG, DIM, write_queries

SAMPLES = 8
ODD = ROLE_STRIDE + 3  # the class image of sample 3


@pytest.fixture
def log(tmp_path: Path) -> RunLog:
    """Eight samples and their class images, one of which pulls hard."""
    rng = np.random.default_rng(0)
    sample = np.tile(np.concatenate([np.arange(SAMPLES), np.arange(SAMPLES) + ROLE_STRIDE]), 6)
    count = len(sample)
    projection = rng.standard_normal((count, DIM))
    rows = {
        "sample": sample,
        "step": np.repeat(np.arange(6), 2 * SAMPLES),
        "timestep": rng.integers(0, 1000, count).astype(np.float32),
        "noise_seed": np.full(count, -1),
        "lr": np.full(count, 1e-3, np.float32),
        "loss": rng.random(count, np.float32),
        "weight": np.full(count, 1 / (2 * SAMPLES), np.float32),
        "grad_norm": np.where(sample == ODD, 50.0, rng.uniform(0.9, 1.1, count)).astype(np.float32),
        "projection": (projection / np.linalg.norm(projection, axis=1, keepdims=True)).astype(np.float16),
    }
    writer = LogWriter(tmp_path / "log", CONFIG)
    writer.put("train", rows)
    writer.snapshot(Snapshot(6, 1e-3, 6e-3), b"")
    writer.close()
    write_queries(tmp_path / "log", "asked")
    return open_log(tmp_path / "log")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(SAMPLES):
        Image.new("L", (8, 8), 30 * index).save(folder / f"{index}.png")
    return folder


def test_the_page_shows_class_images_by_their_sample_and_without_a_picture(
    log: RunLog, images: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    place = [str(tmp_path / "log"), "--images", str(images)]
    assert main(["outliers", *place, "--html", str(page)]) == 0
    html = page.read_text()
    tiles = re.findall(r'<li class="tile" data-sample="(\d+)" data-name="(\d+.png)".*?</li>', html, re.DOTALL)
    assert sorted(tiles) == sorted((str(i), f"{i}.png") for i in range(SAMPLES) for _ in range(2))
    odd = html[html.index(">3.png (class)<") - 400 : html.index(">3.png (class)<")]
    assert 'aria-label="Select sample 3.png (class)"' in odd
    assert html.count("data:image/webp") == SAMPLES + 1, "and the map's sheet"
    assert "cannot be read" not in html
    assert str(ROLE_STRIDE)[:8] not in html
    assert main(["report", *place, "--out", str(page)]) == 0
    html = page.read_text()
    assert "(class)</b>" in html[html.index('id="queries') :]
    assert str(ROLE_STRIDE)[:8] not in html


def test_tables_name_the_row_and_files_for_machines_the_id(
    log: RunLog, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["outliers", str(tmp_path / "log"), "--top", "1"]) == 0
    assert "3 (class)" in capsys.readouterr().out
    assert main(["influence", str(tmp_path / "log"), "--queries", "asked", "--top", "16"]) == 0
    shown = capsys.readouterr().out
    assert "3 (class)" in shown
    assert str(ROLE_STRIDE)[:8] not in shown
    assert diffhook.outliers(log).records(1)[0]["sample"] == ODD


def test_they_are_no_samples_of_the_dataset_where_scores_are_judged(
    log: RunLog, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows_training.py").write_text(
        f"def train(ids):\n    assert set(ids) <= set(range({SAMPLES}))\n    return ids\n"
        "def losses(ids):\n    return [float(sum(ids))] * 6\n"
    )
    (tmp_path / "known.txt").write_text("3 5")
    (tmp_path / "own.txt").write_text("\n".join("ab" * (SAMPLES // 2)))
    (tmp_path / "asked.txt").write_text("\n".join("ababab"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "rows_training", raising=False)
    command = ["evaluate", str(tmp_path / "log"), "--queries", "asked", "--methods", "cosine", "--json"]
    command += ["--sources", str(tmp_path / "own.txt"), "--query-sources", str(tmp_path / "asked.txt")]
    command += ["--outliers", str(tmp_path / "known.txt"), "--top", "2", "--subsets", "6", "--remove"]
    script = tmp_path / "rows_training.py"
    assert main([*command, "--train", f"{script}:train", "--measure", f"{script}:losses"]) == 0
    found = {row["figure"]: row for row in json.loads(capsys.readouterr().out)}
    scores = diffhook.influence(log, "asked", "cosine")
    own = scores.values[:, scores.sample_ids < ROLE_STRIDE]
    top = np.argsort(-own, axis=1)[:, :2]
    assert found["loss rise without the top 2"]["value"] == pytest.approx(-top.sum(1).mean())
    subsets = half_subsets(SAMPLES, 6)
    losses = np.array([[subset.sum()] * 6 for subset in subsets])
    assert found["LDS over 6 subsets"]["value"] == pytest.approx(lds(own, subsets, -losses).mean.mean)
    assert found["average precision"]["beside"] == "at random 0.250"
    assert main(["info", str(tmp_path / "log"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["samples"], facts["class images"]) == (SAMPLES, SAMPLES)


def test_what_is_left_out_are_samples_once(log: RunLog, tmp_path: Path) -> None:
    ranking = diffhook.outliers(log)
    assert ranking.sample_ids[0] == ODD
    ranking.exclude(tmp_path / "exclude.txt", 1)
    assert (tmp_path / "exclude.txt").read_text() == "3\n"
    assert ranking.excluded(16).tolist() == list(
        dict.fromkeys(i % ROLE_STRIDE for i in ranking.sample_ids.tolist())
    )
    assert ranking.keep(range(SAMPLES), 1).indices == [0, 1, 2, 4, 5, 6, 7]
    assert set(ranking.sampler(range(SAMPLES), 1)) == {0, 1, 2, 4, 5, 6, 7}
    with pytest.raises(diffhook.errors.ConfigurationError, match="excludes sample 3, but the dataset has 2"):
        ranking.keep(range(2), 1)


def test_class_images_of_samples_with_names_have_their_name() -> None:
    ids = np.array([7 + ROLE_STRIDE, 7, 9])
    ranking = Ranking(ids, np.array([3.0, 2.0, 1.0]), ((),) * 3, "outliers: norm", names={7: "a.png"})
    assert [r["name"] for r in ranking.records()] == ["a.png (class)", "a.png", ""]
    part = outliers_part(ranking, PictureCache(None))
    assert part is not None
    assert part.html.count('data-sample="7" data-name="a.png"') == 2
    assert '<span class="name">a.png (class)</span>' in part.html
    assert sample_words(9 + 2 * ROLE_STRIDE, {7: "a.png"}) == "9 (row 3)"


def test_an_alert_says_which_row_it_is_about() -> None:
    rows = {
        "sample": np.array([1, ODD]), "step": np.zeros(2, int), "timestep": np.full(2, 500.0),
        "grad_norm": np.array([1.0, np.nan]), "loss": np.ones(2),
    }  # fmt: skip
    (alert,) = NonFinite().look(rows)
    assert alert.samples == [ODD]
    assert alert.message.startswith("sample 3 (class) has a gradient that is not finite")


@pytest.mark.parametrize("source", [list(range(8)), {3: "image"}, lambda sample: sample + 1])
def test_no_image_is_taken_for_that_of_a_further_row(source: Any) -> None:
    found = find_images(source, np.array([3, ODD]))
    assert found is not None
    assert found(3) is not None
    assert found(ODD) is None


@pytest.mark.browser
def test_selected_rows_of_a_sample_are_one_line_of_the_exclude_list(
    log: RunLog, tmp_path: Path, browser: Any
) -> None:
    write_page(tmp_path / "page.html", log, queries={})
    tab = browser.new_page(accept_downloads=True)
    tab.goto((tmp_path / "page.html").as_uri())
    for name in ("Select sample 3 (class)", "Select sample 3", "Select sample 5 (class)"):
        tab.get_by_label(name, exact=True).check()
    assert tab.locator("#selection-count").text_content() == "2 samples selected"
    tab.get_by_label("Select sample 3", exact=True).uncheck()
    assert tab.locator("#selection-count").text_content() == "2 samples selected", "its class row still is"
    with tab.expect_download() as waiting:
        tab.get_by_role("button", name="Download exclude list").click()
    assert Path(waiting.value.path()).read_text() == "3\n5\n"
    tab.close()
