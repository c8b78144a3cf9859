"""Self-influence: how much a sample moves the model by itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from diffhook.analysis.defaults import as_log, best_source
from diffhook.analysis.execution import HERE, Execution
from diffhook.analysis.grouped import distinct_samples
from diffhook.analysis.methods import find_method
from diffhook.analysis.ranking import Ranking
from diffhook.analysis.roles import regularisation_images
from diffhook.analysis.sample_sums import SampleRows, reduce_samples
from diffhook.analysis.tables import snapshot_steps, source_table
from diffhook.errors import ConfigurationError
from diffhook.log import RunLog
from diffhook.log.store import Location

SINGLE = "seen once per snapshot: its ReTrac self-influence is a constant"


def self_influence(
    log: RunLog | Location,
    method: str = "retrac",
    source: str | None = None,
    *,
    execution: Execution = HERE,
) -> Ranking:
    """The influence of each sample on itself: Σ_k w_k ‖mean over rows of g_i‖² (arXiv 2401.09031).

    On the grid (source="probe") the mean is over timesteps, and the result equals the diagonal of
    the matrix that :func:`influence` gives when the probed samples themselves are the queries. On
    training events (source="train") it is over the sample's visits nearest to each snapshot; where
    there was only one, normalised gradients leave ReTrac nothing to tell, and the sample's reason says so.

    By default it is of the best source there is. One pass over the table; what the sums of all samples need
    beyond ``memory`` goes through files.

    Raises:
        LogError, ConfigurationError: as :func:`influence`; or another method than TracIn and ReTrac.
    """
    log, chosen = as_log(log), find_method(method)
    source = best_source(log, execution=execution) if source is None else source
    table = source_table(log, source, method=chosen)
    if not chosen.additive:
        raise ConfigurationError(f"self-influence is that of tracin or retrac, not of {chosen.name!r}")
    rows = SampleRows(chosen, distinct_samples(table, execution), snapshot_steps(log))
    found = reduce_samples(table, rows, _Squares(), execution, f"{chosen.name} self-influence")
    shape = (len(rows.steps), len(rows.sample_ids))
    visits = found.visits.reshape(shape).max(0)
    summed = "aggregate" in log.config["identity"]  # of how many rows a sum is made nobody knows
    constant = chosen.unit and source == "train" and not summed
    reasons = [[SINGLE] if constant and count <= 1 else [] for count in visits]
    title = f"self-influence ({chosen.name}, {source} rows)"
    scores = found.scores.reshape(shape).sum(0)
    ranking = Ranking.sort(
        rows.sample_ids, scores, reasons, title, names=log.names(), thumbnails=log.thumbnails
    )
    return replace(ranking, regularisation=regularisation_images(log))


class _Found(NamedTuple):
    scores: npt.NDArray[np.float64]
    visits: npt.NDArray[np.float64]


@dataclass(frozen=True)
class _Squares:
    """Σ_k W ‖(Σ ω g) / W‖², with W = Σ ω the learning-rate weight of the sample at snapshot k."""

    def reduce(self, start: int, values: npt.NDArray[np.float64]) -> _Found:
        weight, visits, vectors = values[:, 0], values[:, 1], values[:, 2:]
        squares = np.einsum("nd,nd->n", vectors, vectors)
        return _Found(np.divide(squares, weight, out=np.zeros(len(weight)), where=weight > 0), visits.copy())

    def combine(self, results: list[_Found]) -> _Found:
        return _Found(*(np.concatenate(parts) for parts in zip(*results, strict=True)))
