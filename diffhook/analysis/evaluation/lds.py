"""The linear datamodeling score: do scores predict what retrained models do? (Ilyas et al. 2022, TRAK)"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.stats

from diffhook.analysis.evaluation.estimate import Estimate, estimate
from diffhook.errors import ConfigurationError


@dataclass(frozen=True)
class LDS:
    """Agreement between scores and retrained models.

    Attributes:
        correlations: (Q,) Spearman over subsets; NaN where a query's measurements are all equal.
        mean: over queries, with the bootstrap's standard error over queries.
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
    predicted = np.stack([scores[:, np.asarray(subset, int)].sum(1) for subset in subsets])
    correlations = _spearman(predicted, seeds.mean(0))
    return LDS(correlations, estimate(correlations), _ceiling(seeds) if len(seeds) > 1 else None)


def _spearman(left: npt.NDArray[np.float64], right: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """(Q,) of two (M, Q); NaN where a side is constant."""
    found = np.full(left.shape[1], np.nan)
    for query in range(left.shape[1]):
        if np.ptp(left[:, query]) > 0 and np.ptp(right[:, query]) > 0:
            found[query] = scipy.stats.spearmanr(left[:, query], right[:, query]).statistic
    return found


def _ceiling(seeds: npt.NDArray[np.float64]) -> Estimate:
    """Each seed's measurements as the score for the mean of the others."""
    each = [_spearman(seeds[s], np.delete(seeds, s, axis=0).mean(0)) for s in range(len(seeds))]
    return estimate(np.mean(each, axis=0))
