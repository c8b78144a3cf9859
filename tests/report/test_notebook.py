"""What a notebook shows: the page's parts, still, and never at the price of a long computation."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import diffhook
from diffhook.log import LogWriter, RunLog
from diffhook.report.thumbnails import data_uri
from tests.report.logs import CONFIG, photographs, write_log


def test_objects_show_the_parts_of_the_page(log: RunLog) -> None:
    scores = diffhook.influence(log, "held-out")
    assert scores._repr_html_() is None, "nothing is computed to be looked at"
    scores.values  # noqa: B018
    shown = {
        "Samples that stand out": diffhook.outliers(log),
        "What made these images": scores,
        "Gradient norm against timestep": diffhook.bias(log),
        "The same samples for every query?": diffhook.bias(log),
        "This run": log,
    }
    for title, displayed in shown.items():
        html = displayed._repr_html_()
        assert html is not None
        assert title in html
        assert "<script" not in html
        assert "://" not in html


def test_results_show_the_pictures_that_the_log_keeps(tmp_path: Path) -> None:
    write_log(tmp_path / "log", 32)
    png = io.BytesIO()
    Image.fromarray(photographs(1, 8)[0]).save(png, "PNG")
    writer = LogWriter(tmp_path / "log", CONFIG, start_step=12)
    for sample in range(32):
        writer.thumbnail(sample, png.getvalue())
    writer.close()
    scores = diffhook.influence(tmp_path / "log", "held-out", "retrac")
    top = scores.top(3)
    scores.values  # noqa: B018
    neighbours = diffhook.near_duplicates(tmp_path / "log", "train")
    ranking = diffhook.outliers(tmp_path / "log")
    comparison = diffhook.compare(tmp_path / "log", tmp_path / "log")
    made = {"ranking": ranking, "scores": scores, "top": top, "neighbours": neighbours, "same": comparison}
    shown = {name: each._repr_html_() or "" for name, each in made.items()}
    pictures = {name: html.count(data_uri(png.getvalue())) for name, html in shown.items()}
    assert pictures == {
        "ranking": 24,
        "scores": len(re.findall(r'<li( class="noise")?>', shown["scores"])),
        "top": 6 * 3,
        "neighbours": 2 * len(neighbours.closest(24)),
        "same": 0,
    }
    assert pictures["scores"] >= 6 * 2
    for sample in top.sample_ids.ravel().tolist():
        assert f">#{sample}</b>" in shown["top"]


def test_without_matplotlib_a_notebook_shows_the_numbers(
    log: RunLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    html = diffhook.bias(log)._repr_html_()
    assert html is not None
    assert "<svg" not in html
    assert "<details open>" in html


def test_scores_need_neither_templates_nor_pictures() -> None:
    code = (
        "import diffhook.analysis, sys; "
        "print([m for m in ('PIL', 'matplotlib', 'diffhook.report') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
