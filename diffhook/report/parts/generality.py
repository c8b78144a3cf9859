"""The same few samples for every query? Cardinality and generally influential samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from diffhook.analysis import Scores
from diffhook.analysis.bias import Generality
from diffhook.analysis.methods import title_of
from diffhook.report.rendering import Part, part
from diffhook.report.thumbnails import PictureCache, Thumbnail

_SHOWN = 8


@dataclass(frozen=True)
class Frequent:
    """A sample that is in the top of several queries."""

    sample: int
    picture: Thumbnail | None
    queries: int


def generality_part(
    found: Sequence[Generality],
    scores: Mapping[str, Sequence[Scores]] | None = None,
    thumbnails: PictureCache | None = None,
) -> Part | None:
    """A row per query set and method, with the samples that come back most often.

    Args:
        found: the figures.
        scores: query set → scores, one a method, for the samples behind the figures.
        thumbnails: their pictures.
    """
    if not found:
        return None
    pictures = thumbnails or PictureCache(None)
    by_name = {(name, each.method): each for name, group in (scores or {}).items() for each in group}
    rows = []
    for figures in found:
        known = by_name.get((figures.queries, figures.method))
        frequent = [] if known is None else most_frequent(known, figures.k, pictures)
        count = 0 if known is None else len(known.query_ids)
        rows.append((figures, title_of(figures.method), count, frequent))
    return part(
        "generality",
        "The same samples for every query?",
        "Alike for all?",
        rows=rows,
        names=next((each.names for each in by_name.values()), {}),
        share=found[0].general_share,
    )


def most_frequent(scores: Scores, k: int, thumbnails: PictureCache) -> list[Frequent]:
    """The samples in the top k of most queries, of two or more."""
    ids, counts = np.unique(scores.top(k).sample_ids, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:_SHOWN]
    return [Frequent(int(ids[i]), thumbnails(int(ids[i])), int(counts[i])) for i in order if counts[i] > 1]
