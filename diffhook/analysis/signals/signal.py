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
from diffhook.analysis.standardize import standardized
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
    """A table seen sample by sample. Holds its scalar columns, 44 bytes a row."""

    log: RunLog
    source: str
    table: Table
    execution: Execution

    @cached_property
    def _samples(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.intp]]:
        ids, position = np.unique(self.table["sample"], return_inverse=True)
        return ids, position

    @property
    def sample_ids(self) -> npt.NDArray[np.int64]:
        """(N,) ascending."""
        return self._samples[0]

    @cached_property
    def norms(self) -> Floats:
        """(rows,) gradient norms, standardised within timestep bins."""
        return standardized(self.table, "grad_norm")

    def visits(self, rows: npt.NDArray[np.bool_]) -> Floats:
        """(N,) how many of the given rows each sample has."""
        return self.sum(rows.astype(np.float64))

    def sum(self, values: Floats) -> Floats:
        """(N,) sums of (rows,) values by sample."""
        sums: Floats = np.bincount(self._samples[1], values, len(self.sample_ids)).astype(np.float64)
        return sums

    def mean(self, values: Floats) -> Floats:
        """(N,) means of the finite ones of (rows,) values by sample; NaN without any."""
        finite = np.isfinite(values)
        count = self.visits(finite)
        total = self.sum(np.where(finite, values, 0.0))
        return np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0)


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
