"""Copies: the very same picture twice, and pictures nearer to each other than to any third."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from diffhook.analysis.copies import Copies, find_copies
from diffhook.analysis.duplicates import nearest_several
from diffhook.analysis.reason import Reason
from diffhook.analysis.signals.equal import copy_reason
from diffhook.analysis.signals.signal import Found, Signal, View, register
from diffhook.log.samples import sample_words, short_names

_NEAREST = 5  # by gradient, of which the pixels decide


@register
class Duplicate(Signal):
    """How far a picture and its nearest stand from the next; of a log without thumbnails, the cosine to the
    nearest other sample. Told beside the score: what occurs twice is no outlier for that.

    Near copies are told on the grid only, where all gradients are of the same noise, and only where the log's
    thumbnails of both agree; see :mod:`diffhook.analysis.copies`.
    """

    name = "duplicate"
    title = "copies"
    meaning = "nearness to another sample, in gradients and in the pixels of thumbnails"
    ranks = False
    projected = True
    pairwise = True

    def look(self, view: View) -> Found | None:
        if len(view.sample_ids) < 2:
            return None
        ids, nearest, cosines = nearest_several(view.table, view.execution, _NEAREST)
        thumbnails = view.log.thumbnails
        if not thumbnails:
            return Found(cosines[:, 0].astype(float), {})
        # Events of one sample are as far apart as those of two.
        pairs = _pairs(nearest, cosines) if view.source == "probe" else np.empty((0, 2), np.intp)
        found = find_copies(ids, pairs, thumbnails)
        return Found(found.isolation, _reasons(ids, found, view.log.names()))


def _pairs(nearest: npt.NDArray[np.intp], cosines: npt.NDArray[np.float32]) -> npt.NDArray[np.intp]:
    """(P, 2) positions, ascending, each pair once."""
    i, column = np.nonzero(np.isfinite(cosines))
    found: npt.NDArray[np.intp] = np.unique(np.sort(np.column_stack([i, nearest[i, column]])), axis=0)
    return found


def _reasons(ids: npt.NDArray[np.int64], found: Copies, names: dict[int, str]) -> dict[int, Reason]:
    short = short_names(names)
    reasons = {}
    for i, (j, alike) in found.near.items():
        other = int(ids[j])
        words = f"nearly the same picture as {sample_words(other, names)} (correlation of pixels {alike:.2f})"
        reasons[i] = Reason(words, "near copy", f"nearly {sample_words(other, short)}", (other,))
    for i, group in found.exact.items():
        same = tuple(int(ids[j]) for j in group)
        reasons[i] = copy_reason(int(ids[i]), same, names, short, "the very same picture as")
    return reasons
