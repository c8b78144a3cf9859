"""What a notebook shows: the page's parts, still, and never at the price of a long computation."""

from __future__ import annotations

import subprocess
import sys

import pytest

import diffhook
from diffhook.log import RunLog


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
