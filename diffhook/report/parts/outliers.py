"""The gallery of samples that stand out: to look at, sort, filter, and exclude."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np

from diffhook import words
from diffhook.analysis import Ranking
from diffhook.analysis.reason import Reason
from diffhook.analysis.signals import SIGNALS
from diffhook.log.samples import sample_words, short_names, split_id
from diffhook.report.rendering import Part, part
from diffhook.report.thumbnails import Thumbnail, Thumbnails


@dataclass(frozen=True)
class Tile:
    """One sample of the gallery.

    Attributes:
        sample: its id, which the further rows of a sample in a batch share.
        listed: what an exclude list has of it: its name, or its id.
        name: the same without the folders that all names begin with, and which row it is.
        keys: what it can be sorted by, in the order of the part's ``orders``; "" sorts last.
    """

    sample: int
    listed: str
    name: str
    score: str
    picture: Thumbnail | None
    reasons: tuple[Reason, ...]
    keys: tuple[str, ...]


def outliers_part(ranking: Ranking, thumbnails: Thumbnails, top: int = 500, page: int = 60) -> Part | None:
    """The first ``top`` samples of a ranking."""
    if not len(ranking):
        return None
    names, keys = _orders(ranking, top)
    short = short_names(ranking.names)
    tiles = [
        Tile(
            split_id(int(sample))[0],
            ranking.named(split_id(int(sample))[0]),
            sample_words(int(sample), short),
            words.number(float(score)),
            thumbnails(int(sample)),
            tuple(map(Reason.of, flags)),
            key,
        )
        for sample, score, flags, key in zip(
            ranking.sample_ids[:top],
            ranking.scores[:top],
            ranking.flags[:top],
            keys,
            strict=True,
        )
    ]
    kinds = Counter(kind for tile in tiles for kind in {reason.kind for reason in tile.reasons})
    return part(
        "outliers",
        "Samples that stand out",
        "Outliers",
        ranking=ranking,
        tiles=tiles,
        orders=names,
        kinds=kinds.most_common(),
        named=bool(ranking.names),
        flagged=sum(bool(flags) for flags in ranking.flags),
        page=page,
    )


def _orders(ranking: Ranking, top: int) -> tuple[list[str], list[tuple[str, ...]]]:
    """Names of the sort orders, and each tile's keys: rank, the score's parts, id."""
    parts = {name: np.asarray(values)[:top] for name, values in (ranking.parts or {}).items()}
    columns = [[str(rank) for rank in range(len(ranking.sample_ids[:top]))]]
    columns += [[_key(-float(value)) for value in values] for values in parts.values()]
    columns += [[str(split_id(int(sample))[0]) for sample in ranking.sample_ids[:top]]]
    names = [SIGNALS[name].title if name in SIGNALS else name for name in parts]
    return ["score", *names, "sample id"], list(zip(*columns, strict=True))


def _key(value: float) -> str:
    if math.isnan(value):
        return ""
    return f"{value:.6g}" if math.isfinite(value) else f"{math.copysign(1e300, value):g}"
