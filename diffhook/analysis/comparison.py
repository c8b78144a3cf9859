"""Two runs side by side: what leaving samples out has changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.stats

from diffhook.analysis.bias import TimestepBin, timestep_bins
from diffhook.analysis.defaults import as_log
from diffhook.analysis.evaluation.estimate import Estimate
from diffhook.analysis.exclude_list import excluded_indices
from diffhook.analysis.execution import HERE, Execution
from diffhook.analysis.outliers import outliers
from diffhook.analysis.ranking import Ranking
from diffhook.analysis.signals import View
from diffhook.analysis.standardize import bin_edges, looked_at
from diffhook.analysis.tables import appearance_table
from diffhook.appearance import COLUMNS
from diffhook.errors import ConfigurationError
from diffhook.log import RunLog, Table
from diffhook.log.store import Location
from diffhook.notebook import Displayed

_LAST = 0.75  # of a run's steps are behind the rows that are compared
_BINS = 20
_FEWEST = 16  # samples by whose appearance one can say whether two runs' ids mean the same
_SAME = 0.5  # rank correlation of their appearance

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Curves:
    """A column by timestep in both runs, of the samples that both have, in the same bins."""

    before: list[TimestepBin]
    after: list[TimestepBin]


@dataclass(frozen=True)
class Comparison(Displayed):
    """Two runs, of samples under the ids of the first.

    Attributes:
        locations: where the two logs lie.
        before, after: both rankings, of the samples that both runs have.
        left_out: the first run's ranking of the samples that the second does not have.
        added: ids of those that only the second has.
        source: the rows compared: "probe", of each run's last snapshot, or "train", of its last quarter.
        loss, norm: by timestep; None where a log does not know it.
        change: of the mean loss of a sample, relative to the first run's, over the samples that both have,
            with its standard error over samples, not over trainings; None likewise.
        agreement: Spearman correlation of the two rankings' scores.
    """

    locations: tuple[str, str]
    before: Ranking
    after: Ranking
    left_out: Ranking
    added: Ids
    source: str
    loss: Curves | None
    norm: Curves | None
    change: Estimate | None
    agreement: float

    def __repr__(self) -> str:
        change = "" if self.change is None else f", loss {self.change.mean:+.1%} ± {self.change.error:.1%}"
        return (
            f"<Comparison of {self.locations[1]} with {self.locations[0]}: {len(self.before):,} samples in "
            f"both, {len(self.left_out):,} left out, {len(self.added):,} new{change}, rank correlation "
            f"{self.agreement:.2f}>"
        )

    @property
    def places(self) -> npt.NDArray[np.int64]:
        """(M, 2): each sample's place in both rankings, from 1 on, in the order of ``before``."""
        place = {int(sample): rank for rank, sample in enumerate(self.after.sample_ids, 1)}
        pairs = [(rank, place[int(sample)]) for rank, sample in enumerate(self.before.sample_ids, 1)]
        return np.array(pairs, np.int64).reshape(-1, 2)

    def moved(self, k: int, *, down: bool = False) -> npt.NDArray[np.intp]:
        """Positions in ``before`` of the k samples whose score rose most (or fell), strongest first.

        Those that are among the highest tenth of neither run are left out: they move by chance.
        """
        scores = self.scores
        change = scores[:, 1] - scores[:, 0]
        high = self.places.min(1) <= max(len(scores) // 10, k)
        order = np.argsort(change if down else -change, kind="stable")
        chosen = order[high[order] & ((change[order] < 0) if down else (change[order] > 0))]
        return chosen[:k]

    @property
    def scores(self) -> npt.NDArray[np.float64]:
        """(M, 2): each sample's score in both runs, in the order of ``before``; of a sample whose gradient
        was not finite, one above all others."""
        after = dict(zip(self.after.sample_ids.tolist(), self.after.scores.tolist(), strict=True))
        found = np.column_stack([self.before.scores, [after[s] for s in self.before.sample_ids.tolist()]])
        top = np.max(found[np.isfinite(found)], initial=0.0) + 1
        return np.where(np.isfinite(found), found, top)


def compare(
    before: RunLog | Location,
    after: RunLog | Location,
    *,
    excluded: str | Path | None = None,
    execution: Execution = HERE,
) -> Comparison:
    """Set a run against the one before it, such as one on the dataset without what stood out.

    Args:
        before, after: the runs, or where they lie.
        excluded: the exclude list by which :func:`diffhook.without` made the second run's dataset, where its
            samples are numbered: in the subset they count anew.
        execution: as for :func:`diffhook.influence`.

    Raises:
        LogError: a run has no rows.
        ConfigurationError: the runs have no sample in common, or their ids do not mean the same samples.
    """
    first, second = as_log(before), as_log(after)
    renamed = _renaming(first, second, excluded)
    source = "probe" if len(first.probe) and len(second.probe) else "train"
    found = (outliers(log, execution=execution) for log in (first, second))
    rankings = next(found), _renamed(next(found), renamed, first.names())
    common = np.intersect1d(rankings[0].sample_ids, rankings[1].sample_ids)
    if not len(common):
        raise ConfigurationError(
            f"{first.location} and {second.location} have no sample in common: are they of one dataset?"
        )
    if not first.names():
        _check_appearance(first, second, renamed, common, execution)
    shared, other = (ranking.take(np.isin(ranking.sample_ids, common)) for ranking in rankings)
    rows = [_last_rows(log, source, rename, common) for log, rename in ((first, _same), (second, renamed))]
    return Comparison(
        locations=(first.location, second.location),
        before=shared,
        after=other,
        left_out=rankings[0].take(~np.isin(rankings[0].sample_ids, common)),
        added=np.setdiff1d(rankings[1].sample_ids, common),
        source=source,
        loss=_curves(rows, "loss"),
        norm=_curves(rows, "grad_norm"),
        change=_change(rows, common),
        agreement=_agreement(shared, other),
    )


# ── which samples are the same ────────────────────────────────────────────────────────────────────


def _same(ids: Ids) -> Ids:
    return ids


def _renaming(first: RunLog, second: RunLog, excluded: str | Path | None) -> Callable[[Ids], Ids]:
    """From the second run's ids to the first's."""
    if bool(first.names()) != bool(second.names()):
        named, other = (first, second) if first.names() else (second, first)
        raise ConfigurationError(
            f"{named.location} has names of its samples and {other.location} has numbers: they cannot be "
            "told to be the same"
        )
    if excluded is None or first.names():
        return _same
    out = excluded_indices(excluded)

    def renamed(ids: Ids) -> Ids:
        every = np.arange(int(ids.max(initial=0)) + len(out) + 1)
        return np.asarray(every[~np.isin(every, out)][ids], np.int64)

    return renamed


def _renamed(ranking: Ranking, rename: Callable[[Ids], Ids], names: dict[int, str]) -> Ranking:
    return replace(ranking, sample_ids=rename(ranking.sample_ids), names={**ranking.names, **names})


def _check_appearance(
    first: RunLog, second: RunLog, rename: Callable[[Ids], Ids], common: Ids, execution: Execution
) -> None:
    """Raises ConfigurationError where samples of one id look unlike each other in the two runs."""
    appearances = [
        _appearance(log, change, common, execution) for log, change in ((first, _same), (second, rename))
    ]
    for one, other in zip(*appearances, strict=True):
        known = np.isfinite(one) & np.isfinite(other)
        if known.sum() < _FEWEST or np.ptp(one[known]) == 0 or np.ptp(other[known]) == 0:
            continue
        alike = scipy.stats.spearmanr(one[known], other[known])[0]
        if alike < _SAME:
            raise ConfigurationError(
                f"sample {common[0]} of {first.location} is not sample {common[0]} of {second.location}, by "
                f"what the logs know of their pixels (rank correlation {alike:.2f}): a Subset counts anew, "
                "so pass the exclude list that made it, or train with names"
            )


def _appearance(
    log: RunLog, rename: Callable[[Ids], Ids], common: Ids, execution: Execution
) -> list[npt.NDArray[np.float64]]:
    """(M,) each: mean, contrast and roughness of the common samples; NaN where not known."""
    table = appearance_table(log)
    if table is None:
        return [np.full(len(common), np.nan) for _ in COLUMNS]
    view = View(log, table.name, table, execution)
    order = np.searchsorted(common, renamed := rename(view.sample_ids)).clip(0, len(common) - 1)
    mine = common[order] == renamed
    found = []
    for column in COLUMNS:
        values = np.full(len(common), np.nan)
        values[order[mine]] = view.means(table, column)[0][mine]
        found.append(values)
    return found


# ── what has changed ──────────────────────────────────────────────────────────────────────────────


def _last_rows(
    log: RunLog, source: str, rename: Callable[[Ids], Ids], common: Ids
) -> dict[str, npt.NDArray[Any]]:
    """The columns of the common samples' last rows."""
    table: Table = log.probe if source == "probe" else log.train
    rows = looked_at(table, ("sample", "step", "timestep", "loss", "grad_norm"))
    rows["sample"] = rename(rows["sample"])
    last = rows["step"].max(initial=0)
    late = rows["step"] == last if source == "probe" else rows["step"] >= _LAST * last
    kept = late & np.isin(rows["sample"], common)
    return {name: column[kept] for name, column in rows.items()}


def _agreement(before: Ranking, after: Ranking) -> float:
    """Spearman correlation of the scores of the same samples."""
    after = after.take(np.argsort(after.sample_ids))
    place = np.searchsorted(after.sample_ids, before.sample_ids)
    return float(scipy.stats.spearmanr(before.scores, after.scores[place])[0])


def _curves(rows: Sequence[dict[str, npt.NDArray[Any]]], column: str) -> Curves | None:
    kept = [np.isfinite(each[column]) & np.isfinite(each["timestep"]) for each in rows]
    if not all(mask.any() for mask in kept):
        return None
    timesteps = [each["timestep"][mask] for each, mask in zip(rows, kept, strict=True)]
    edges = bin_edges(np.concatenate(timesteps), _BINS)
    bins = [
        timestep_bins(when, each[column][mask], edges)
        for when, each, mask in zip(timesteps, rows, kept, strict=True)
    ]
    return Curves(*bins)


def _change(rows: Sequence[dict[str, npt.NDArray[Any]]], common: Ids) -> Estimate | None:
    """Relative change of the samples' mean losses, with its standard error over samples."""
    means = []
    for each in rows:
        known = np.isfinite(each["loss"])
        place = np.searchsorted(common, each["sample"][known])
        count = np.bincount(place, minlength=len(common))
        total = np.bincount(place, each["loss"][known], len(common))
        means.append(np.divide(total, count, out=np.full(len(common), np.nan), where=count > 0))
    both = np.isfinite(means).all(0)
    if both.sum() < 2 or not means[0][both].mean() > 0:
        return None
    relative = (means[1] - means[0])[both] / means[0][both].mean()
    return Estimate(float(relative.mean()), float(relative.std(ddof=1) / np.sqrt(both.sum())))
