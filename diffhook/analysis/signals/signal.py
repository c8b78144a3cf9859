"""What an outlier signal is, and what it looks at."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from diffhook.analysis.execution import Execution
from diffhook.analysis.grouped import distinct_samples
from diffhook.analysis.signals.visits import Visits, count_visits
from diffhook.log import RunLog, Table

Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Found:
    """What a signal says of every sample.

    Attributes:
        scores: (N,) float64, high: an outlier; NaN where it knows nothing.
        reasons: position of a sample → words, for those that stand out.
    """

    scores: Floats
    reasons: dict[int, str]


@dataclass(frozen=True)
class View:
    """A table seen sample by sample. Reads it shard by shard, and holds some numbers for each sample."""

    log: RunLog
    source: str
    table: Table
    execution: Execution

    @cached_property
    def sample_ids(self) -> npt.NDArray[np.int64]:
        """(N,) ascending."""
        return distinct_samples(self.table, self.execution)

    @cached_property
    def norms(self) -> Visits:
        """By gradient norm."""
        return count_visits(self.table, self.sample_ids, "grad_norm", self.execution)

    @cached_property
    def losses(self) -> Visits:
        """By the sample's own loss."""
        return count_visits(self.table, self.sample_ids, "loss", self.execution)


class Signal(ABC):
    """One way to see that a sample is unlike the others.

    Attributes:
        name: its name among ``Ranking.parts``.
        meaning: in words.
        counts: whether it enters the combined score, or is told beside it.
        projected: whether it needs projections.
    """

    name: str
    meaning: str
    counts = True
    projected = False

    @abstractmethod
    def look(self, view: View) -> Found | None:
        """What it says of every sample; None where the log cannot tell."""


SIGNALS: dict[str, Signal] = {}


def register(kind: type[Signal]) -> type[Signal]:
    """Class decorator: the class under its name."""
    SIGNALS[kind.name] = kind()
    return kind


def flagged(which: npt.NDArray[np.bool_], words: Callable[[int], str]) -> dict[int, str]:
    """Reasons for the samples that ``which`` names."""
    return {int(index): words(int(index)) for index in np.flatnonzero(which)}
