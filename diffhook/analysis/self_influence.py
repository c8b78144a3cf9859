"""Self-influence: how much a sample pulls the model by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from diffhook.analysis.methods import Method, find_method
from diffhook.analysis.ranking import Ranking
from diffhook.analysis.scan import Partial, scan, sum_by_position
from diffhook.analysis.tables import nearest, source_table
from diffhook.log import Block, RunLog, Table

_MEMORY = 1 << 27  # numbers held at once: samples go through in parts

SINGLE = "seen once per snapshot: its ReTrac self-influence is a constant"


def self_influence(
    log: RunLog,
    method: str = "retrac",
    source: str = "train",
    *,
    client: Any = None,
    scheduler: Any = None,
) -> Ranking:
    """The influence of each sample on itself: Σ_k w_k ‖mean over rows of g_i‖² (arXiv 2401.09031).

    On the grid (source="probe") the mean is over timesteps, and the result equals the diagonal of
    the matrix that :func:`influence` gives when the probed samples themselves are the queries. On
    training events (source="train") it is over the sample's visits nearest to each snapshot; where
    there was only one, normalised gradients leave ReTrac nothing to tell, and the sample is flagged.

    Raises:
        LogError, ConfigurationError: as :func:`influence`.
    """
    chosen, table = find_method(method), source_table(log, source)
    sample_ids = np.unique(table["sample"])
    steps = np.unique([s.step for s in log.snapshots] or [0]).astype(np.int64)
    width = len(steps) * (table.dim + 2)
    part = max(_MEMORY // width, 1)
    scores, visits = [], []
    for start in range(0, len(sample_ids), part):
        ids = sample_ids[start : start + part]
        task = _Mean(chosen, ids, steps, table.dim)
        options = {"client": client, "scheduler": scheduler}
        sums = scan(table, task, len(ids) * len(steps), table.dim + 2, **options)
        weight, count, vector = sums[:, 0], sums[:, 1], sums[:, 2:]
        # Σ_k W ‖(Σ ω g) / W‖², with W = Σ ω the learning-rate weight of the sample at snapshot k
        each = np.divide((vector**2).sum(1), weight, out=np.zeros(len(weight)), where=weight > 0)
        scores.append(each.reshape(len(ids), len(steps)).sum(1))
        visits.append(count.reshape(len(ids), len(steps)).max(1))
    constant = method == "retrac" and source == "train"
    flags = [[SINGLE] if constant and n <= 1 else [] for n in np.concatenate(visits)]
    title = f"self-influence ({method}, {source} rows)"
    return Ranking.sort(sample_ids, np.concatenate(scores), flags, title)


@dataclass(frozen=True)
class _Mean:
    """Per sample and snapshot: Σ ω, number of rows, Σ ω·length·p, with ω = lr · weight."""

    method: Method
    sample_ids: npt.NDArray[np.int64]
    steps: npt.NDArray[np.int64]
    dim: int

    def __call__(self, table: Table, block: Block) -> Partial:
        columns = {c: table.read(block, c) for c in ("sample", "step", "lr", "weight", "grad_norm")}
        wanted = np.isin(columns["sample"], self.sample_ids)
        columns = {name: values[wanted] for name, values in columns.items()}
        lengths = self.method.row_weights(columns)
        rate = np.where(lengths > 0, columns["lr"].astype(np.float64) * columns["weight"], 0.0)
        projection = table.read(block, "projection")[wanted].astype(np.float64)
        values = np.column_stack([rate, lengths > 0, projection * lengths[:, None]])
        sample = np.searchsorted(self.sample_ids, columns["sample"])
        position = sample * len(self.steps) + nearest(columns["step"], self.steps)
        return sum_by_position(position, values)
