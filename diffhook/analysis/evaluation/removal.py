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
        removed: (Q,) each under the model without its own top k, and those of the queries of its group.
        random: (Q,) each under a model without as many at random.
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
    together: int = 1,
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
        together: queries of a group, whose tops are left out at once. So many times fewer trainings, and a
            little noise by what is left out for others, at random as well as here.
        options: ``record``, ``processes`` and ``progress`` of :func:`retrain`.

    Raises:
        ConfigurationError: ids outside the dataset; groups of none, or that leave no sample; measure gives
            another number of losses than Q; as :func:`retrain`.
    """
    chosen = np.asarray(top, np.int64)
    ids = ids_of(samples)
    if chosen.ndim != 2 or not chosen.size or not np.isin(chosen, ids).all():
        raise ConfigurationError(f"top has shape {chosen.shape}; expected (Q, k) ids of {len(ids)} samples")
    queries, k = chosen.shape
    if together < 1:
        raise ConfigurationError(f"together is {together}; expected 1 or more queries")
    rng = np.random.default_rng(control_seed)
    order = rng.permutation(ids)
    controls = np.stack([rng.choice(ids, k, replace=False) for _ in range(queries)])
    group = np.arange(queries) // together
    count = int(group[-1]) + 1
    gone = [each[group == number] for each in (chosen, controls) for number in range(count)]
    without = [order[~np.isin(order, some)] for some in gone]
    if not all(map(len, without)):
        raise ConfigurationError(f"tops of {together} queries together are all {len(ids)} samples")
    found = retrain(train, measure, [order, *without], seeds=seeds, queries=queries, **options)
    losses = found.losses.mean(0)
    whole = losses[0]
    own = np.arange(queries)
    removed, random = losses[1 + group, own], losses[1 + count + group, own]
    return Removal(whole, removed, random, estimate(removed - whole), estimate(random - whole))
