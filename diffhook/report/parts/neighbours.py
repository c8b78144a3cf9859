"""The pairs of samples whose gradients are most alike."""

from __future__ import annotations

from diffhook.analysis import Neighbours
from diffhook.log.samples import short_names
from diffhook.report.rendering import Part, part
from diffhook.report.thumbnails import PictureCache


def neighbours_part(found: Neighbours, thumbnails: PictureCache, k: int) -> Part | None:
    """The ``k`` closest pairs, side by side."""
    pairs = [
        ([(sample, thumbnails(sample)), (other, thumbnails(other))], f"{cosine:.3f}")
        for sample, other, cosine in found.closest(k)
    ]
    if not pairs:
        return None
    return part(
        "neighbours",
        "The closest pairs",
        "Neighbours",
        pairs=pairs,
        total=len(found.sample_ids),
        names=short_names(found.names),
    )
