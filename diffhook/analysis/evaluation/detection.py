"""Outlier detection: does a ranking put known outliers first?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.stats

from diffhook.analysis.ranking import Ranking
from diffhook.errors import ConfigurationError
from diffhook.log.samples import ROLE_STRIDE


@dataclass(frozen=True)
class Detection:
    """How well a ranking finds known outliers.

    Attributes:
        auroc: chance that an outlier ranks above another sample; 0.5: at random.
        average_precision: at random, the base rate. Tells more, where outliers are rare.
        base_rate: share of outliers.
    """

    auroc: float
    average_precision: float
    base_rate: float


def detection(ranking: Ranking, outliers: npt.ArrayLike) -> Detection:
    """AUROC and average precision of a ranking; samples of equal score share their rank. Further rows of
    samples, such as class images, are left out of it.

    Args:
        outliers: ids of the known outliers; those that are not in the ranking do not count.

    Raises:
        ConfigurationError: none of the samples, or all of them, are outliers.
    """
    own = ranking.sample_ids < ROLE_STRIDE
    known, scores = np.isin(ranking.sample_ids[own], np.asarray(outliers)), ranking.scores[own]
    positive = int(known.sum())
    if positive in (0, len(known)):
        raise ConfigurationError(
            f"{positive} of the ranking's {len(known)} samples are outliers; expected some"
        )
    ranks = scipy.stats.rankdata(scores)
    above = ranks[known].sum() - positive * (positive + 1) / 2
    auroc = above / (positive * (len(known) - positive))
    # Precision at each threshold, weighted by the recall it adds.
    _, last = np.unique(-scores, return_index=True)
    ends = np.append(last[1:], len(known)) - 1
    hits = np.cumsum(known)[ends]
    gained = np.diff(hits, prepend=0) / positive
    return Detection(float(auroc), float((gained * hits / (ends + 1)).sum()), positive / len(known))
