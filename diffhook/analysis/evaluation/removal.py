"""Counterfactual removal: does a query fare worse without the samples that are said to have made it?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from diffhook.analysis.evaluation.estimate import Estimate, estimate
from diffhook.analysis.evaluation.retraining import Measure, Train, ids_of, retrain
from diffhook.errors import ConfigurationError


@dataclass(frozen=True)
class Removal:
    """Losses of the queries under models trained on all samples, and on all but k.

    Attributes:
        whole: (Q,) trained on all.
        removed: (Q,) each under the model without its own top k.
        random: (Q,) each under a model without k samples at random.
        effect, control: mean of removed − whole and of random − whole. Only a difference of both
            says something.
    """

    whole: npt.NDArray[np.float64]
    removed: npt.NDArray[np.float64]
    random: npt.NDArray[np.float64]
    effect: Estimate
    control: Estimate


def removal(
    train: Train,
    measure: Measure,
    top: npt.ArrayLike,
    samples: int | npt.NDArray[np.int64],
    *,
    seeds: Sequence[int] = (0,),
    control_seed: int = 0,
    **options: Any,
) -> Removal:
    """Train on all samples, without each query's top, and without as many at random.

    All trainings of a seed start alike and see the remaining samples in the same order.

    Args:
        train, measure: as for :func:`retrain`.
        top: (Q, k) ids to remove for each query, such as ``influence(...).top(k).sample_ids``.
        samples: N, for ids 0 … N − 1; or the (N,) ids.
        seeds: trainings of each, averaged.
        options: ``record``, ``processes`` and ``progress`` of :func:`retrain`.

    Raises:
        ConfigurationError: ids outside the dataset; measure gives another number of losses than Q; as
            :func:`retrain`.
    """
    chosen = np.asarray(top, np.int64)
    ids = ids_of(samples)
    if chosen.ndim != 2 or not chosen.size or not np.isin(chosen, ids).all():
        raise ConfigurationError(f"top has shape {chosen.shape}; expected (Q, k) ids of {len(ids)} samples")
    queries, k = chosen.shape
    rng = np.random.default_rng(control_seed)
    order = rng.permutation(ids)
    controls = [rng.choice(ids, k, replace=False) for _ in range(queries)]
    without = [order[~np.isin(order, gone)] for gone in [*chosen, *controls]]
    found = retrain(train, measure, [order, *without], seeds=seeds, queries=queries, **options)
    losses = found.losses.mean(0)
    whole = losses[0]
    removed, random = np.diagonal(losses[1 : queries + 1]), np.diagonal(losses[queries + 1 :])
    return Removal(whole, removed, random, estimate(removed - whole), estimate(random - whole))
