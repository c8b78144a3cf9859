"""The linear datamodeling score: do scores predict what retrained models do? (Ilyas et al. 2022, TRAK)"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.stats

from diffhook.analysis.evaluation.estimate import Estimate
from diffhook.errors import ConfigurationError

_RESAMPLES = 200  # gives the error itself to 5%


@dataclass(frozen=True)
class LDS:
    """Agreement between scores and retrained models.

    Attributes:
        correlations: (Q,) Spearman over subsets; NaN where a query's measurements are all equal.
        mean: over queries, with the bootstrap's standard error over queries and subsets: all queries share
            the subsets, so their correlations err together. It is rather too large than too small.
        ceiling: what the measurements of another seed reach as scores; None with one seed.
    """

    correlations: npt.NDArray[np.float64]
    mean: Estimate
    ceiling: Estimate | None = None


def lds(
    scores: npt.ArrayLike,
    subsets: Sequence[npt.ArrayLike],
    measured: npt.ArrayLike,
) -> LDS:
    """Spearman over subsets between what was measured and the sum of the scores of a subset's samples.

    Example:
        >>> found = lds([[.1, .2, .3, .4], [.2, .1, .3, .4]], [[0, 1], [0, 2], [1, 2]],
        ...             [[.3, .3], [.4, .4], [.5, .3]])
        >>> found.correlations.round(7).tolist()
        [1.0, 0.8660254]

    Args:
        scores: (Q, N); column i is training sample i.
        subsets: M index arrays, the samples that each model was trained on.
        measured: (M, Q), or (seeds, M, Q) for several trainings of each subset, which are averaged:
            a number that is high where a model serves the query well. For losses, their negative.

    Raises:
        ConfigurationError: shapes that do not fit, or fewer than 3 subsets.
    """
    predicted, seeds = _predicted(scores, subsets, measured)
    correlations = _spearman(predicted, seeds.mean(0))
    ceiling = _ceiling(seeds) if len(seeds) > 1 else None
    return LDS(correlations, _estimate([(predicted, seeds.mean(0))]), ceiling)


def lds_lead(
    scores: npt.ArrayLike, others: npt.ArrayLike, subsets: Sequence[npt.ArrayLike], measured: npt.ArrayLike
) -> Estimate:
    """How much higher the LDS of ``scores`` is than that of ``others``.

    Both are resampled with the same queries and subsets, so what is hard for both does not widen the error.

    Args:
        scores, others, subsets, measured: as for :func:`lds`.

    Raises:
        ConfigurationError: as :func:`lds`.
    """
    (first, seeds), (second, _) = (_predicted(each, subsets, measured) for each in (scores, others))
    both = [[(predicted, seeds.mean(0))] for predicted in (first, second)]
    return _bootstrapped(lambda *chosen: _mean(both[0], *chosen) - _mean(both[1], *chosen), first.shape)


Pair = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]


def _predicted(scores: npt.ArrayLike, subsets: Sequence[npt.ArrayLike], measured: npt.ArrayLike) -> Pair:
    """(M, Q) sums of the scores of each subset's samples, and (seeds, M, Q) what was measured."""
    scores, measured = np.asarray(scores, np.float64), np.asarray(measured, np.float64)
    seeds = measured if measured.ndim == 3 else measured[None]
    expected = (len(subsets), len(scores))
    if seeds.shape[1:] != expected:
        raise ConfigurationError(
            f"measured has shape {measured.shape}; expected (…, subsets, queries) = {expected}"
        )
    if len(subsets) < 3:
        raise ConfigurationError(f"there are {len(subsets)} subsets; a rank correlation needs 3 or more")
    last = max(int(np.max(subset, initial=0)) for subset in subsets)
    if last >= scores.shape[1]:
        raise ConfigurationError(f"a subset names sample {last}, but there are scores of {scores.shape[1]}")
    return np.stack([scores[:, np.asarray(subset, int)].sum(1) for subset in subsets]), seeds


def _spearman(left: npt.NDArray[np.float64], right: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """(Q,) of two (M, Q); NaN where a side is constant."""
    first, second = (scipy.stats.rankdata(side, axis=0) - (len(side) + 1) / 2 for side in (left, right))
    with np.errstate(invalid="ignore"):
        found = (first * second).sum(0) / np.sqrt((first**2).sum(0) * (second**2).sum(0))
    return np.asarray(found, np.float64)


def _ceiling(seeds: npt.NDArray[np.float64]) -> Estimate:
    """Each seed's measurements as the score for the mean of the others."""
    return _estimate([(seed, np.delete(seeds, s, axis=0).mean(0)) for s, seed in enumerate(seeds)])


def _estimate(pairs: list[Pair]) -> Estimate:
    """The mean correlation of pairs of (M, Q), over queries; its error over queries and subsets."""
    return _bootstrapped(lambda *chosen: _mean(pairs, *chosen), pairs[0][0].shape)


def _mean(pairs: list[Pair], rows: Any = slice(None), columns: Any = slice(None)) -> float:
    """Of the correlations of chosen subsets, over chosen queries; NaN where there are none."""
    found = np.concatenate([_spearman(*(side[rows][:, columns] for side in pair)) for pair in pairs])
    return float(found[np.isfinite(found)].mean()) if np.isfinite(found).any() else float("nan")


def _bootstrapped(value: Callable[..., float], shape: tuple[int, ...]) -> Estimate:
    """A value of chosen subsets and queries, and its standard error over both."""
    rng = np.random.default_rng(0)
    found = [value(*(rng.integers(0, count, count) for count in shape)) for _ in range(_RESAMPLES)]
    return Estimate(value(), float(np.nanstd(found)) if np.isfinite(found).any() else float("nan"))
