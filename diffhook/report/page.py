"""One self-contained HTML page: the outlier ranking, and what influenced the queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from diffhook.analysis import Ranking, Scores
from diffhook.log import RunLog
from diffhook.report.images import Images, data_uri


@dataclass(frozen=True)
class _Tile:
    sample: int
    caption: str
    image: str | None
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class QueryStrip:
    """A query's image and the samples that one method names as its strongest."""

    query: int
    image: str | None
    methods: dict[str, tuple[list[_Tile], list[_Tile]]]  # method → proponents, opponents


def write_page(
    path: str | Path,
    log: RunLog,
    ranking: Ranking,
    images: Images | None = None,
    *,
    strips: Sequence[QueryStrip] = (),
    k: int = 120,
    title: str = "diffhook",
) -> None:
    """Write the page.

    Args:
        path: the HTML file.
        log: the run that it is about.
        ranking: whose first ``k`` samples make the contact sheet.
        images: sample id → image; None for a page without pictures.
        strips: from :func:`query_strips`.
    """
    environment = Environment(
        loader=PackageLoader("diffhook.report", "."), autoescape=True, undefined=StrictUndefined
    )
    page = environment.get_template("page.html.jinja").render(
        title=title,
        facts=_facts(log),
        ranking=ranking,
        tiles=[
            _Tile(int(sample), f"{score:.2f}", _picture(images, int(sample)), flags)
            for sample, score, flags in zip(
                ranking.sample_ids[:k], ranking.scores[:k], ranking.flags[:k], strict=True
            )
        ],
        strips=strips,
    )
    Path(path).write_text(page, encoding="utf-8")


def query_strips(
    scores: Sequence[Scores], query_images: Images | None, images: Images | None, k: int = 8
) -> list[QueryStrip]:
    """One strip per query, with the top k proponents and opponents under each of ``scores``."""
    tops = [(s.method, s.top(k), s.top(k, opponents=True)) for s in scores]
    strips = []
    for row, query in enumerate(scores[0].query_ids):
        methods = {
            method: (_tiles(top, row, images), _tiles(bottom, row, images)) for method, top, bottom in tops
        }
        strips.append(QueryStrip(int(query), _picture(query_images, int(query)), methods))
    return strips


def _tiles(top: Any, row: int, images: Images | None) -> list[_Tile]:
    return [
        _Tile(int(sample), f"{score:+.2e}", _picture(images, int(sample)))
        for sample, score in zip(top.sample_ids[row], top.scores[row], strict=True)
    ]


def _picture(images: Images | None, sample: int) -> str | None:
    return None if images is None else data_uri(images(sample))


def _facts(log: RunLog) -> dict[str, str]:
    identity = log.config["identity"]
    projection = identity["projection"]
    return {
        "model": str(identity["model"]["class"]).rpartition(".")[2],
        "trained parameters": f"{len(identity['parameters'])} tensors",
        "projection": f"{projection['kind']}, D = {projection['dim']}",
        "rows": f"{len(log.train):,} train, {len(log.probe):,} probe",
        "snapshots at steps": ", ".join(str(s.step) for s in log.snapshots) or "none",
        "alerts": f"{len(log.alerts()):,}",
    }
