"""The page's parts as a notebook shows them: still, without scripts."""

from __future__ import annotations

from functools import singledispatch
from typing import Any

from diffhook import words
from diffhook.analysis import BiasReport, Ranking, Scores
from diffhook.log import RunLog
from diffhook.report.parts.generality import generality_part
from diffhook.report.parts.norms import norms_part
from diffhook.report.parts.outliers import outliers_part
from diffhook.report.parts.queries import queries_part
from diffhook.report.parts.run import run_part
from diffhook.report.rendering import Part, render
from diffhook.report.thumbnails import Thumbnails

_SAMPLES = 24
_QUERIES = 8
_NO_IMAGES = Thumbnails(None)


def render_object(shown: Any) -> str | None:
    """HTML for an object of diffhook's; None where there is nothing to see, so that its repr is shown."""
    found = [part for part in parts_of(shown) if part is not None]
    return words.printable(render("notebook.html.jinja", parts=found)) if found else None


@singledispatch
def parts_of(shown: Any) -> list[Part | None]:
    """The parts that show an object."""
    return []


@parts_of.register
def _(shown: Ranking) -> list[Part | None]:
    return [outliers_part(shown, _NO_IMAGES, _SAMPLES)]


@parts_of.register
def _(shown: Scores) -> list[Part | None]:
    if "values" not in vars(shown):  # looking at an object must not start an hour's work
        return []
    return [queries_part("", [shown], _NO_IMAGES, _NO_IMAGES, queries=_QUERIES)]


@parts_of.register
def _(shown: BiasReport) -> list[Part | None]:
    return [norms_part(shown, need_chart=False), generality_part(shown.generality)]


@parts_of.register
def _(shown: RunLog) -> list[Part | None]:
    return [run_part(shown)]
