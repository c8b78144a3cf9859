"""The page's parts as a notebook shows them: still, without scripts."""

from __future__ import annotations

from collections.abc import Mapping
from functools import singledispatch
from typing import Any

from diffhook import words
from diffhook.analysis import BiasReport, Comparison, Neighbours, Ranking, Scores, Top
from diffhook.log import RunLog
from diffhook.report.parts.comparison import change_part, moved_part
from diffhook.report.parts.generality import generality_part
from diffhook.report.parts.neighbours import neighbours_part
from diffhook.report.parts.norms import norms_part
from diffhook.report.parts.outliers import outliers_part
from diffhook.report.parts.queries import queries_part
from diffhook.report.parts.run import run_part
from diffhook.report.parts.top import top_part
from diffhook.report.rendering import Part, render
from diffhook.report.thumbnails import PictureCache

_SAMPLES = 24
_QUERIES = 8


def render_object(shown: Any) -> str | None:
    """HTML for an object of diffhook's; None where there is nothing to see, so that its repr is shown."""
    found = [part for part in parts_of(shown) if part is not None]
    return words.printable(render("notebook.html.jinja", parts=found)) if found else None


def _pictures(thumbnails: Mapping[int, bytes]) -> PictureCache:
    """The log's own; those of queries are not in it."""
    return PictureCache(thumbnails.get if thumbnails else None)


@singledispatch
def parts_of(shown: Any) -> list[Part | None]:
    """The parts that show an object."""
    return []


@parts_of.register
def _(shown: Ranking) -> list[Part | None]:
    return [outliers_part(shown, _pictures(shown.thumbnails), _SAMPLES)]


@parts_of.register
def _(shown: Scores) -> list[Part | None]:
    if "values" not in vars(shown):  # looking at an object must not start an hour's work
        return []
    return [queries_part("", [shown], _pictures(shown.thumbnails), PictureCache(None), queries=_QUERIES)]


@parts_of.register
def _(shown: Top) -> list[Part | None]:
    return [top_part(shown, _pictures(shown.thumbnails), _QUERIES, _SAMPLES)]


@parts_of.register
def _(shown: Neighbours) -> list[Part | None]:
    return [neighbours_part(shown, _pictures(shown.thumbnails), _SAMPLES)]


@parts_of.register
def _(shown: BiasReport) -> list[Part | None]:
    return [norms_part(shown, need_chart=False), generality_part(shown.generality)]


@parts_of.register
def _(shown: Comparison) -> list[Part | None]:
    pictures = _pictures(shown.before.thumbnails)
    return [change_part(shown, pictures, _SAMPLES), moved_part(shown, pictures, _SAMPLES)]


@parts_of.register
def _(shown: RunLog) -> list[Part | None]:
    return [run_part(shown)]
