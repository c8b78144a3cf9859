"""Samples whose gradient was not finite: those that began with it before those that they spoiled."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from diffhook.analysis.signals import View
from diffhook.analysis.tables import appearance_table
from diffhook.appearance import COLUMNS
from diffhook.log import Table
from diffhook.log.samples import sample_words


class Broken(NamedTuple):
    """One such sample.

    Attributes:
        first: the first step at which it was not finite.
        words: what is to be said of it.
    """

    first: int
    words: str


def non_finite_samples(view: View) -> dict[int, Broken]:
    """Position of a sample → what is known, in the order in which they come first.

    An image that is not finite itself comes first; then whose gradient was not finite at the earliest
    step, for once an optimiser has taken such a step, every gradient is lost; then by the share of visits.
    """
    bad, seen = view.norms.infinite, view.norms.seen + view.norms.infinite
    positions = np.flatnonzero(bad)
    if not len(positions):
        return {}
    tables = [table for table in (view.log.train, view.table) if len(table)]
    first = np.minimum.reduce([_first_steps(table, view.sample_ids) for table in tables])
    image = _broken_images(view)
    order = positions[np.lexsort((-bad[positions] / seen[positions], first[positions], ~image[positions]))]
    culprit = sample_words(view.sample_ids[order[0]], view.log.names())
    found = {}
    for i in order.tolist():
        words = f"gradient not finite on {bad[i]:.0f} of {seen[i]:.0f} visits"
        if image[i]:
            words += ": the image itself is not"
        elif first[i] > first[order[0]]:
            words += f", all of them after sample {culprit}'s of step {first[order[0]]}"
        found[i] = Broken(int(first[i]), words)
    return found


def _first_steps(table: Table, sample_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """(N,) the first step with a gradient that is not finite; of those without one, the highest integer."""
    found = np.full(len(sample_ids), np.iinfo(np.int64).max)
    for block in table.blocks():
        bad = ~np.isfinite(table.read(block, "grad_norm"))
        if bad.any():
            sample, step = (table.read(block, name)[bad] for name in ("sample", "step"))
            known = np.isin(sample, sample_ids)
            np.minimum.at(found, np.searchsorted(sample_ids, sample[known]), step[known])
    return found


def _broken_images(view: View) -> npt.NDArray[np.bool_]:
    """(N,) whose own figures were never finite, though others' were."""
    table = appearance_table(view.log)
    if table is None:
        return np.zeros(len(view.sample_ids), np.bool_)
    known = view.means(table, COLUMNS[0])[1] > 0
    return ~known if known.any() else np.zeros(len(known), np.bool_)
