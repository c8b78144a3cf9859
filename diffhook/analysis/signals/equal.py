"""Exact copies by their gradients alone."""

from __future__ import annotations

import numpy as np

from diffhook.analysis.equal_gradients import equal_gradients
from diffhook.analysis.reason import COPY, Reason
from diffhook.analysis.signals.signal import Found, Signal, View, register
from diffhook.log.samples import sample_words, short_names

NAMED = 3  # of very many copies of one picture, such as a black one


@register
class Equal(Signal):
    """How many other samples have the same gradients wherever both were probed: a grid's are all of the same
    noise, and equal ones are of equal pictures under equal conditions. Told beside the score, without
    thumbnails, too."""

    name = "equal"
    title = "exact copies"
    meaning = "other samples with the same gradients, to rounding, on a probe's whole grid"
    ranks = False

    def look(self, view: View) -> Found | None:
        if not len(view.log.probe):
            return None
        place = {sample: i for i, sample in enumerate(view.sample_ids.tolist())}
        known = np.isin(view.sample_ids, np.asarray(view.log.probe["sample"]))
        scores, reasons = np.where(known, 0.0, np.nan), {}
        names = view.log.names()
        short = short_names(names)
        for group in equal_gradients(view.log.probe, view.execution):
            for sample in place.keys() & set(group):
                scores[place[sample]] = len(group) - 1
                reasons[place[sample]] = copy_reason(sample, group, names, short, "the same gradients as")
        return Found(scores, reasons)


def copy_reason(
    sample: int, group: tuple[int, ...], names: dict[int, str], short: dict[int, str], what: str
) -> Reason:
    """Why a sample is an exact copy.

    Args:
        group: ids of all that are copies of each other, its own among them.
        what: what they share, "the very same picture as".
    """
    named = tuple(other for other in group[: NAMED + 1] if other != sample)[:NAMED]
    told = ", ".join(sample_words(other, names) for other in named)
    more = len(group) - 1 - len(named)
    words = f"{what} {told}" + (f" and {more:,} more" if more else "")
    brief = f"same as {sample_words(named[0], short)}" + (f" + {len(group) - 2}" if group[2:] else "")
    return Reason(words, COPY, brief, named)
