"""Tracing in a mixture: do the strongest samples come from the query's own source?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from diffhook.analysis.bias import cardinality
from diffhook.analysis.evaluation.estimate import Estimate, estimate
from diffhook.errors import ConfigurationError


@dataclass(frozen=True)
class Tracing:
    """Tracing precision.

    Attributes:
        shares: (Q,) share of each query's top k from its own source.
        precision: mean over queries.
        chance: what a random top would have.
        cardinality: see :func:`~diffhook.analysis.bias.cardinality`.
    """

    shares: npt.NDArray[np.float64]
    precision: Estimate
    chance: float
    cardinality: float


def tracing(top: npt.ArrayLike, sample_sources: npt.ArrayLike, query_sources: npt.ArrayLike) -> Tracing:
    """Share of each query's strongest samples that have the query's source (or label).

    Args:
        top: (Q, k) ids, such as ``influence(...).top(k).sample_ids``.
        sample_sources: (N,) the source of sample i at position i.
        query_sources: (Q,).

    Raises:
        ConfigurationError: shapes that do not fit.
    """
    chosen, own, asked = np.asarray(top, np.int64), np.asarray(sample_sources), np.asarray(query_sources)
    if len(asked) != len(chosen):
        raise ConfigurationError(f"there are sources of {len(asked)} queries; expected {len(chosen)}")
    if chosen.size and chosen.max() >= len(own):
        raise ConfigurationError(f"there are sources of {len(own)} samples, but the top names {chosen.max()}")
    shares = (own[chosen] == asked[:, None]).mean(1)
    chance = float(np.mean([(own == source).mean() for source in asked]))
    return Tracing(shares, estimate(shares), chance, cardinality(chosen))
