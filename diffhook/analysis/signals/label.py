"""Samples that seem to be of another class than their label says, or to have another's caption."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from diffhook.analysis.class_names import class_names
from diffhook.analysis.fisher import combined, log10_tail
from diffhook.analysis.label_neighbours import label_neighbours
from diffhook.analysis.ranking import Labels
from diffhook.analysis.reason import Reason
from diffhook.analysis.signals.signal import PAIRWISE, Floats, Found, Signal, View, register
from diffhook.log import Table
from diffhook.words import one_line

_FAR = 2.5  # −log10 of a probability: of a wrong label, which few samples have
_LEAST_TRUST = 0.1  # of a signal that agrees with no label

Integers = npt.NDArray[np.int64]


@register
class Label(Signal):
    """−log10 of the probability that a sample seems so wrongly labelled by chance.

    Of probes that tried other labels or captions: log loss under the own − log of the smallest under another,
    mean over snapshots. Where labels are given, or probes were told classes: how much nearer the nearest
    samples of another label are than those of the same. Where there are both, Fisher's method joins them,
    each weighted by the log odds that it finds a sample's own label the best, as votes are that are right so
    often (Nitzan and Paroush 1982). Stands beside the score: mixed in, it is drowned.

    All pairs of samples are compared, of up to :data:`PAIRWISE` samples unless labels are given.
    """

    name = "label"
    title = "another label fits better"
    meaning = "loss under the sample's own label or caption against that under others, and neighbours' labels"

    def look(self, view: View) -> Found | None:
        losses = _Losses.read(view)
        labels = view.labels
        if labels is None and losses is not None and len(view.sample_ids) <= PAIRWISE:
            labels = losses.labels(view)
        neighbours = _neighbours(view, labels or {}, view.table if losses is None else view.log.probe)
        evidence = [each[0] for each in (losses, neighbours) if each is not None]
        if not evidence:
            return None
        scores = _joined(evidence)
        told = _Words(view, labels or {}, losses, neighbours)
        far = np.flatnonzero(np.nan_to_num(scores) > _FAR)
        return Found(scores, {i: told.reason(i) for i in far.tolist()}, told.labels())


def _joined(evidence: list[Floats]) -> Floats:
    """(N,) NaN where all know nothing."""
    trust = np.array([max(_log_odds(values), _LEAST_TRUST) for values in evidence])
    scores = combined(evidence, (trust / trust.mean()).tolist())
    return np.where(np.isfinite(evidence).any(0), scores, np.nan)


def _log_odds(values: Floats) -> float:
    """That a sample's own label is the best: the values of these are negative."""
    known = values[np.isfinite(values)]
    right = (np.count_nonzero(known < 0) + 1) / (len(known) + 2)
    return float(np.log(right / (1 - right)))


class _Neighbours(NamedTuple):
    """What :func:`label_neighbours` says of N samples.

    Attributes:
        nearer: (N,) NaN where it knows nothing.
        others: N labels; None where it knows none.
    """

    nearer: Floats
    others: list[Hashable]


def _neighbours(view: View, labels: Mapping[int, Hashable], table: Table) -> _Neighbours | None:
    """None without labels or projections."""
    if not labels or not table.dim:
        return None
    ids, nearer, others = label_neighbours(table, labels, view.execution)
    place = {sample: i for i, sample in enumerate(ids.tolist())}
    at = [place.get(sample, -1) for sample in view.sample_ids.tolist()]
    found = np.where(np.array(at) < 0, np.nan, nearer[at])
    return _Neighbours(found, [None if i < 0 else others[i] for i in at])


class _Losses(NamedTuple):
    """What probes say that tried other labels or captions.

    Attributes:
        contrasts: (N,) log loss under the own − log of the smallest under another; NaN where none was tried.
        own, better: (N,) each: the class that the model was told, and the one that fitted better at the last
            snapshot; −1 where the log does not say.
    """

    contrasts: Floats
    own: Integers
    better: Integers

    @classmethod
    def read(cls, view: View) -> _Losses | None:
        """None where no probe tried any."""
        table = view.log.probe
        if not any("label_contrast" in group.columns for group in table.groups):
            return None
        contrasts, counts = view.means(table, "label_contrast")
        if not counts.any():
            return None
        own, better = np.full((2, len(view.sample_ids)), -1)
        for block in table.blocks():  # in the order of the snapshots
            rows = {name: table.read(block, name) for name in ("sample", "label", "better_label")}
            known = np.isin(rows["sample"], view.sample_ids) & (rows["better_label"] >= 0)
            at = np.searchsorted(view.sample_ids, rows["sample"][known])
            own[at], better[at] = rows["label"][known], rows["better_label"][known]
        return cls(contrasts, own, better)

    def labels(self, view: View) -> dict[int, Hashable]:
        """Sample id → the class that the model was told."""
        told = zip(view.sample_ids.tolist(), self.own.tolist(), strict=True)
        return {sample: number for sample, number in told if number >= 0}


class _Words:
    """What is said of each sample's label, and of the one that fits better."""

    def __init__(
        self,
        view: View,
        labels: Mapping[int, Hashable],
        losses: _Losses | None,
        neighbours: _Neighbours | None,
    ) -> None:
        ids = view.sample_ids.tolist()
        self._losses = losses
        self._class: Callable[[int], str] = str
        self._louder = np.zeros(len(ids), bool)
        if losses is not None:
            self._class = class_names(dict(zip(ids, losses.own.tolist(), strict=True)), view.labels, view.log)
            self._louder = log10_tail(losses.contrasts) < (log10_tail(neighbours.nearer) if neighbours else 0)
        quoted = view.labels is not None

        def text(label: Hashable) -> str:
            return f"'{one_line(str(label))}'" if quoted else self._class(int(str(label)))

        self._own = [text(labels[i]) if i in labels else "" for i in ids]
        others = neighbours.others if neighbours else [None] * len(ids)
        self._nearer = ["" if other is None else text(other) for other in others]

    def labels(self) -> Labels | None:
        """None of captions."""
        if not any(self._own):
            return None
        return Labels(tuple(self._own), tuple(self._better(i) for i in range(len(self._own))))

    def reason(self, i: int) -> Reason:
        said = []
        if self._losses is not None and self._losses.contrasts[i] > 0:
            less = f"loss {1 - np.exp(-self._losses.contrasts[i]):.0%} less"
            said.append(f"the model fits {self._fitting(i) or 'another label or caption'} better ({less})")
        if self._nearer[i]:
            said.append(f"its gradients are near those of {self._nearer[i]}")
        labelled = f"labelled {self._own[i]}; " if self._own[i] else ""
        brief = f"rather {self._better(i) or 'another'}?"
        return Reason(labelled + ", and ".join(said), "wrong label", brief)

    def _better(self, i: int) -> str:
        """The label that fits better, by what speaks louder; "" where nothing says which."""
        by_loss, near = self._fitting(i), self._nearer[i]
        return (by_loss or near) if self._louder[i] else (near or by_loss)

    def _fitting(self, i: int) -> str:
        number = -1 if self._losses is None else int(self._losses.better[i])
        return self._class(number) if number >= 0 else ""
