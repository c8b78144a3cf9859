"""Influence scores: all of them, the strongest only, and how sure they are."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.stats

from diffhook.analysis.cost import Cost
from diffhook.analysis.draws import Uncertainty
from diffhook.analysis.score_pass import ScorePass, strongest
from diffhook.errors import ConfigurationError
from diffhook.log.samples import NAMES_AS_THEY_ARE, sample_words, short_names
from diffhook.notebook import Displayed
from diffhook.words import spreadsheet_cell, table

_SHOWN = 10  # queries of a repr, and samples of each


@dataclass(frozen=True)
class Top(Displayed):
    """The k samples of highest (or lowest) score for each query.

    Attributes:
        sample_ids: (Q, k) int64.
        scores: (Q, k) float32.
        query_ids: (Q,) int64.
        names: id → name, of samples that have one.
        thumbnails: id → PNG, where the log keeps them.
    """

    sample_ids: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]
    query_ids: npt.NDArray[np.int64]
    names: Mapping[int, str] = field(default_factory=dict)
    thumbnails: Mapping[int, bytes] = field(default_factory=dict)

    title: ClassVar[str] = "Top {} of"

    def __repr__(self) -> str:
        short, (queries, k) = short_names(self.names), self.sample_ids.shape
        rows = [
            (query, ", ".join(f"{sample_words(i, short)} ({_signed(s)})" for i, s in zip(*row, strict=True)))
            for query, *row in zip(
                self.query_ids[:_SHOWN].tolist(),
                self.sample_ids[:_SHOWN, :_SHOWN].tolist(),
                self.scores[:_SHOWN, :_SHOWN].tolist(),
                strict=True,
            )
        ]
        more = f"\n… and {queries - _SHOWN:,} more queries" if queries > _SHOWN else ""
        listed = table(("query", "samples (score)"), rows, longest=110)
        asked = f"{queries:,} {'query' if queries == 1 else 'queries'}"
        return f"{self.title.format(k)} {asked}\n{listed}{more}"


class Certainty(NamedTuple):
    """How sure a top is of itself, as far as draws of noise can tell."""

    errors: npt.NDArray[np.float32]  # (Q, k), of the top's scores: see Scores.errors
    beyond: npt.NDArray[np.bool_]  # (Q, k): whether 0 lies outside the score's 95% interval
    stability: npt.NDArray[np.float64] | None  # (Q,): see Scores.stability


@dataclass(frozen=True)
class Scores(Displayed):
    """Influence scores; computed when they are first asked for.

    :meth:`top` goes over the rows without holding all scores, unless :attr:`values` is there already.
    Positive: a step on the sample lowers the query's loss (proponent); negative: it raises it.

    Attributes:
        query_ids: (Q,) int64.
        sample_ids: (N,) int64, ascending.
        method: the method's name.
        source: which rows were scored: "train", "probe", or a query set of training samples.
        names: id → name, of samples that have one.
        thumbnails: id → PNG, where the log keeps them: what a notebook shows.
    """

    query_ids: npt.NDArray[np.int64]
    sample_ids: npt.NDArray[np.int64]
    method: str
    source: str
    _pass: ScorePass = field(repr=False)
    names: Mapping[int, str] = field(default_factory=dict, repr=False)
    thumbnails: Mapping[int, bytes] = field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        known = "values are there" if "values" in vars(self) else "computed when asked for: .top(k), .values"
        return (
            f"<Scores of {len(self.query_ids):,} queries × {len(self.sample_ids):,} samples by "
            f"{self.method}, {self.source} rows; {known}>"
        )

    @cached_property
    def values(self) -> npt.NDArray[np.float32]:
        """(Q, N) float32."""
        return self._pass.values()

    @cached_property
    def errors(self) -> npt.NDArray[np.float32] | None:
        """(Q, N) float32: standard errors over other draws of noise, on both sides; None where unknown.

        The queries' part is known where their noise has replicates (``Grid(replicates=R)``), the training's
        from its own rows, or from probes with the same replicates. See :mod:`diffhook.analysis.draws`.
        """
        found = self._uncertainty
        return None if found is None else found.error

    @cached_property
    def margins(self) -> npt.NDArray[np.float32] | None:
        """(Q, N) float32: half the width of the scores' 95% intervals, by Student's distribution."""
        found = self._uncertainty
        return None if found is None else _margins(found)

    @cached_property
    def _uncertainty(self) -> Uncertainty | None:
        return self._pass.uncertainty()

    def stability(self, k: int) -> npt.NDArray[np.float64] | None:
        """(Q,): the share of a query's top k that stays when a noise replicate is left out, on average.

        None where the queries' noise was drawn once. 1: every top is the same.
        """
        checked_size("k", k)
        found = self.certainty(self.top(k)) if self.has_errors else None
        return None if found is None else found.stability

    def certainty(self, top: Top, *, opponents: bool = False) -> Certainty | None:
        """How sure what :meth:`top` gave is, in one pass that does not hold all errors.

        None where nothing is known of other draws.

        Args:
            opponents: whether it is the lowest scores.
        """
        ids = top.sample_ids
        found = self._pass.uncertainty_at(np.searchsorted(self.sample_ids, ids), opponents)
        if found is None:
            return None
        uncertainty, without = found
        beyond = np.abs(top.scores) > _margins(uncertainty)
        if without is None:
            return Certainty(uncertainty.error, beyond, None)
        shares = [
            np.mean([len(np.intersect1d(mine, other)) for other in others]) / len(mine)
            for mine, others in zip(ids, without, strict=True)
        ]
        return Certainty(uncertainty.error, beyond, np.array(shares))

    @property
    def has_errors(self) -> bool:
        """Whether something is known of other draws of noise."""
        return self._pass.draws is not None

    @property
    def cost(self) -> Cost:
        """What computing :attr:`values` or :meth:`top` takes, known beforehand."""
        return self._pass.cost()

    @property
    def certainty_cost(self) -> Cost | None:
        """What :attr:`errors` or :meth:`certainty` takes after that; None where there are none."""
        return self._pass.uncertainty_cost()

    def top(self, k: int, *, opponents: bool = False) -> Top:
        """The k strongest proponents of each query, strongest first (or opponents). Of equals, the
        lower id.

        Raises:
            ConfigurationError: k < 1.
        """
        checked_size("k", k)
        if "values" in self.__dict__:
            index = strongest(-self.values if opponents else self.values, k)
            found = self.sample_ids[index], np.take_along_axis(self.values, index, 1)
        else:
            found = self._pass.top(k, opponents)
        return Top(*found, self.query_ids, self.names, self.thumbnails)

    def to_csv(self, path: str | Path, k: int | None = None) -> None:
        """Write rows of query, rank, sample, score, error where there are any, and name where samples have
        names: the top k, or all."""
        top = self.top(k or len(self.sample_ids))
        columns: list[npt.NDArray[Any]] = [top.sample_ids, top.scores, *self._errors_of(top, whole=not k)]
        header = ["query", "rank", "sample", "score", "error"][: 2 + len(columns)]
        with open(path, "w", newline="", encoding="utf-8", errors=NAMES_AS_THEY_ARE) as file:
            writer = csv.writer(file)
            writer.writerow([*header, *(["name"] if self.names else [])])
            for query, *of_query in zip(self.query_ids, *columns, strict=True):
                for rank, (sample, *numbers) in enumerate(zip(*of_query, strict=True), 1):
                    name = [spreadsheet_cell(sample_words(sample, self.names))] if self.names else []
                    writer.writerow([query, rank, sample, *(repr(float(n)) for n in numbers), *name])

    def _errors_of(self, top: Top, whole: bool) -> Iterator[npt.NDArray[np.float32]]:
        """(Q, k); nothing where there are none."""
        if whole or "_uncertainty" in self.__dict__:
            if self.errors is not None:
                yield np.take_along_axis(self.errors, np.searchsorted(self.sample_ids, top.sample_ids), 1)
        elif (found := self.certainty(top)) is not None:
            yield found.errors

    def to_parquet(self, path: str | Path) -> None:
        """Write all scores, a column per query, and one of names where samples have them. Needs the extra
        "parquet"."""
        from diffhook.analysis.parquet import write_parquet

        columns = {f"query_{q}": row for q, row in zip(self.query_ids, self.values, strict=True)}
        names = [sample_words(sample, self.names) for sample in self.sample_ids] if self.names else []
        write_parquet(path, {"sample": self.sample_ids, **({"name": names} if names else {}), **columns})


def _margins(found: Uncertainty) -> npt.NDArray[np.float32]:
    """Half the width of 95% intervals; infinite where the error is not known."""
    half = scipy.stats.t.ppf(0.975, np.maximum(found.dof, 1)) * found.error
    return np.where(np.isnan(half), np.inf, half).astype(np.float32)


def _signed(score: float) -> str:
    return f"{score:+.2g}".replace("-", "−")


def checked_size(name: str, value: int, least: int = 1) -> None:
    """Raises ConfigurationError below the least that is possible."""
    if value < least:
        raise ConfigurationError(f"{name} is {value}; expected at least {least}")
