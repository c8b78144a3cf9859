"""The gallery of samples that stand out: to look at, sort, filter, and exclude."""

from __future__ import annotations

from dataclasses import dataclass

from diffhook import words
from diffhook.analysis import Ranking
from diffhook.analysis.reason import Reason
from diffhook.analysis.signals import SIGNALS
from diffhook.log.samples import sample_words, short_names, split_id
from diffhook.report.explorer import Explorer
from diffhook.report.rendering import Part, part
from diffhook.report.thumbnails import PictureCache, Thumbnail

_PAGE = 60  # tiles that are shown at once


@dataclass(frozen=True)
class Tile:
    """One sample of the gallery.

    Attributes:
        sample: its id, which the further rows of a sample in a batch share.
        listed: what an exclude list has of it: its name, or its id.
        name: the same without the folders that all names begin with, and which row it is.
        telling: its reasons, as :meth:`Reason.telling` has them.
    """

    sample: int
    listed: str
    name: str
    score: str
    picture: Thumbnail | None
    telling: list[Reason]


def outliers_part(
    ranking: Ranking,
    thumbnails: PictureCache,
    top: int = 500,
    *,
    explorer: Explorer | None = None,
) -> Part | None:
    """The first ``top`` samples of a ranking; with an explorer, its map and filters, and all its samples."""
    if not len(ranking):
        return None
    short = short_names(ranking.names)
    first = ranking.take(slice(top))
    tiles = [
        Tile(
            split_id(int(sample))[0],
            ranking.named(split_id(int(sample))[0]),
            sample_words(int(sample), short),
            words.number(float(score)),
            thumbnails(int(sample)),
            Reason.telling(given),
        )
        for sample, score, given in zip(first.sample_ids, first.scores, first.reasons, strict=True)
    ]
    return part(
        "outliers",
        "Samples that stand out",
        "Samples to check",
        ranking=ranking,
        counted=_counted(ranking),
        tiles=tiles,
        explorer=explorer,
        listed=len(tiles) if explorer is None else len(explorer.ranking),
        orders=["score", *(SIGNALS[n].title if n in SIGNALS else n for n in ranking.signals), "sample id"],
        named=bool(ranking.names),
        flagged=sum(bool(given) for given in ranking.reasons),
        page=_PAGE,
    )


def _counted(ranking: Ranking) -> str:
    """What is in the score, in words."""
    titles = [SIGNALS[name].title if name in SIGNALS else name for name in ranking.counted]
    return " and ".join(filter(None, (", ".join(titles[:-1]), *titles[-1:])))
