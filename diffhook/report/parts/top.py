"""The strongest samples of each query, a row of pictures each."""

from __future__ import annotations

from diffhook.analysis import Top
from diffhook.log.samples import short_names
from diffhook.report.rendering import Part, part
from diffhook.report.thumbnails import PictureCache


def top_part(top: Top, thumbnails: PictureCache, queries: int, k: int) -> Part | None:
    """The first ``k`` of the first ``queries``."""
    if not top.sample_ids.size:
        return None
    rows = [
        (
            int(query),
            [
                (sample, thumbnails(sample), f"{score:+.3g}".replace("-", "−"))
                for sample, score in zip(ids[:k].tolist(), scores[:k].tolist(), strict=True)
            ],
        )
        for query, ids, scores in zip(
            top.query_ids[:queries], top.sample_ids[:queries], top.scores[:queries], strict=True
        )
    ]
    return part(
        "top",
        f"{top.title.format(top.sample_ids.shape[1])} each query",
        "Top",
        rows=rows,
        total=len(top.query_ids),
        names=short_names(top.names),
    )
