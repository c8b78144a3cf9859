"""Samples that seem to be of another class than their label says, or to have another's caption."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from diffhook.analysis.class_names import class_names
from diffhook.analysis.fisher import combined
from diffhook.analysis.label_neighbours import label_neighbours
from diffhook.analysis.ranking import Labels
from diffhook.analysis.reason import Reason
from diffhook.analysis.signals.signal import PAIRWISE, Floats, Found, Signal, View, register
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
        losses, neighbours = _Losses.read(view), None
        labels = view.labels
        if labels is None and losses is not None and len(view.sample_ids) <= PAIRWISE:
            labels = losses.labels(view)
        if labels and view.table.dim:
            neighbours = label_neighbours(view.table, labels, view.execution)
        evidence = [*([losses.contrasts] if losses else []), *([neighbours[0]] if neighbours else [])]
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


@dataclass(frozen=True)
class _Losses:
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
        neighbours: tuple[Floats, list[Hashable]] | None,
    ) -> None:
        ids = view.sample_ids.tolist()
        self._losses = losses
        self._class: Callable[[int], str] = str
        if losses is not None:
            self._class = class_names(dict(zip(ids, losses.own.tolist(), strict=True)), view.labels, view.log)
        quoted = view.labels is not None

        def text(label: Hashable) -> str:
            return f"'{one_line(str(label))}'" if quoted else self._class(int(str(label)))

        self.own = [text(labels[i]) if i in labels else "" for i in ids]
        others = [None] * len(ids) if neighbours is None else neighbours[1]
        self.nearer = ["" if other is None else text(other) for other in others]

    def labels(self) -> Labels | None:
        """None of captions."""
        if not any(self.own):
            return None
        return Labels(tuple(self.own), tuple(self.better(i) for i in range(len(self.own))))

    def better(self, i: int) -> str:
        """The label that fits better, "" where nothing says which."""
        return self.nearer[i] or (self._by_loss(i) if self._losses is not None else "")

    def reason(self, i: int) -> Reason:
        said = []
        if self._losses is not None and self._losses.contrasts[i] > 0:
            less = f"loss {1 - np.exp(-self._losses.contrasts[i]):.0%} less"
            said.append(f"the model fits {self._by_loss(i) or 'another label or caption'} better ({less})")
        if self.nearer[i]:
            said.append(f"its gradients are near those of {self.nearer[i]}")
        labelled = f"labelled {self.own[i]}; " if self.own[i] else ""
        return Reason(labelled + ", and ".join(said), "wrong label", f"rather {self.better(i) or 'another'}?")

    def _by_loss(self, i: int) -> str:
        assert self._losses is not None
        number = int(self._losses.better[i])
        return self._class(number) if number >= 0 else ""
