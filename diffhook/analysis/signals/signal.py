"""What an outlier signal is, and what it looks at."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt

from diffhook.analysis.execution import Execution
from diffhook.analysis.grouped import Division, distinct_samples, grouped
from diffhook.analysis.ranking import Labels
from diffhook.analysis.reason import Reason
from diffhook.analysis.sample_sums import SampleMeans, Whole
from diffhook.analysis.signals.visits import VisitCounts, count_visits
from diffhook.contract import check_answers, check_name
from diffhook.log import Block, RunLog, Table

Floats = npt.NDArray[np.floating[Any]]

PAIRWISE = 20_000  # samples up to which all pairs are compared unless asked


@dataclass(frozen=True)
class Found:
    """What a signal says of every sample.

    Attributes:
        scores: (N,) float64, high: an outlier; NaN where it knows nothing.
        reasons: position of a sample → why, for those that stand out.
        labels: of a signal that is about them: each sample's, and the best of the others.
    """

    scores: Floats
    reasons: dict[int, Reason]
    labels: Labels | None = None


@dataclass(frozen=True)
class View:
    """A table seen sample by sample. Reads it shard by shard, and holds some numbers for each sample.

    Attributes:
        labels: sample id → its label, where the user tells them.
    """

    log: RunLog
    source: str
    table: Table
    execution: Execution
    labels: Mapping[int, Hashable] | None = None

    @cached_property
    def sample_ids(self) -> npt.NDArray[np.int64]:
        """(N,) ascending."""
        return distinct_samples(self.table, self.execution)

    @cached_property
    def norms(self) -> VisitCounts:
        """By gradient norm."""
        return count_visits(self.table, self.sample_ids, "grad_norm", self.execution)

    @cached_property
    def losses(self) -> VisitCounts:
        """By the sample's own loss."""
        return count_visits(self.table, self.sample_ids, "loss", self.execution)

    def means(self, table: Table, column: str) -> tuple[Floats, Floats]:
        """(N,) each: mean of the column's finite values, NaN where a sample has none, and their number."""
        sums = grouped(
            table,
            SampleMeans(self.sample_ids, partial(_column, name=column)),
            Division.make(len(self.sample_ids), 2, self.execution),
            Whole(),
            self.execution,
            f"reading {column}",
        )
        total, count = sums.T
        return np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0), count


def _column(table: Table, block: Block, name: str) -> Floats:
    return table.read(block, name)


class Signal(ABC):
    """One way to see that a sample is unlike the others.

    Attributes:
        name: its name among ``Ranking.signals``.
        title: what pages call it.
        meaning: in words.
        counted_on: the sources on which it enters the combined score; on others it is told beside it.
        ranks: whether one can rank by it at all.
        projected: whether it needs projections.
        pairwise: whether it compares all pairs of samples.
    """

    name: str
    title: str
    meaning: str
    counted_on: frozenset[str] = frozenset()
    ranks = True
    projected = False
    pairwise = False

    @abstractmethod
    def look(self, view: View) -> Found | None:
        """What it says of every sample; None where the log cannot tell."""


SIGNALS: dict[str, Signal] = {}


_QUESTIONS = {
    "name": "name, among a ranking's signals",
    "title": "title, what pages call it",
    "meaning": "meaning, in words",
    "look": "look(view), which says what it makes of every sample",
}


def register(kind: type[Signal]) -> type[Signal]:
    """Class decorator: the class under its name.

    Raises:
        ConfigurationError: it leaves out an answer, or another class has its name.
    """
    check_answers(kind, Signal, "signal", _QUESTIONS)
    check_name(kind, kind.name, "the signal", SIGNALS)
    SIGNALS[kind.name] = kind()
    return kind


def flagged(
    which: npt.NDArray[np.bool_], kind: str, brief: Callable[[int], str], words: Callable[[int], str]
) -> dict[int, Reason]:
    """Reasons for the samples that ``which`` names: in a few words with their strength, and in a sentence."""
    return {int(i): Reason(words(int(i)), kind, brief(int(i))) for i in np.flatnonzero(which)}
