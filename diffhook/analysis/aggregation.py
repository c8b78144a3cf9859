"""One row for each sample and snapshot, in place of the sample's rows near it, that scores as they did.

A row is ω · norm_factor(‖g‖) · p in every score, so rows of a sample at a snapshot add up. One sum cannot
serve two factors: TracIn's is Σ ω g, ReTrac's Σ ω g/‖g‖.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from diffhook.analysis.execution import MEMORY, Execution
from diffhook.analysis.grouped import distinct_samples
from diffhook.analysis.methods import METHODS, Method, find_method
from diffhook.analysis.sample_sums import SampleRows, reduce_samples
from diffhook.analysis.tables import snapshot_steps, source_table
from diffhook.errors import ConfigurationError
from diffhook.log import Rows, RunLog
from diffhook.log.samples import split_id


def summable_methods() -> list[str]:
    """Names of the methods for which rows may be summed up."""
    return sorted((name for name, method in METHODS.items() if method.summable), reverse=True)


@dataclass(frozen=True)
class Aggregation:
    """Sums up a table's rows for one method; see :func:`diffhook.log.compaction.compact`.

    Attributes:
        name: of a method whose scores are sums over rows, see :attr:`Method.summable`: "tracin" or "retrac".
        memory: bytes that it may hold; larger sums go through files.
        progress: show a bar, on a terminal.

    Raises:
        ConfigurationError: another name.
    """

    name: str
    memory: int = MEMORY
    progress: bool = False

    def __post_init__(self) -> None:
        if self.name not in summable_methods():
            known = " or ".join(summable_methods())
            raise ConfigurationError(f"rows cannot be summed for {self.name!r}; expected {known}")

    def __call__(self, log: RunLog, source: str, write: Callable[[Rows], None]) -> None:
        """Sum up the rows of "train" or "probe".

        Args:
            write: is handed the new rows, in float32, ordered by snapshot and sample id.
        """
        # In one thread: rows are handed over in order.
        execution = Execution(scheduler="synchronous", memory=self.memory, progress=self.progress)
        table, method = source_table(log, source), find_method(self.name)
        rows = SampleRows(method, distinct_samples(table, execution), snapshot_steps(log))
        sums = _Sums(method, rows.sample_ids, rows.steps, write)
        reduce_samples(table, rows, sums, execution, f"summing up {source} rows")
        sums.write_missing(table.dim)


@dataclass
class _Sums:
    method: Method
    sample_ids: npt.NDArray[np.int64]
    steps: npt.NDArray[np.int64]
    write: Callable[[Rows], None]
    missing: npt.NDArray[np.bool_] = field(init=False)  # samples without a row so far

    def __post_init__(self) -> None:
        self.missing = np.ones(len(self.sample_ids), np.bool_)

    def reduce(self, start: int, values: npt.NDArray[np.float64]) -> None:
        used = np.flatnonzero(values[:, 1])
        if not len(used):
            return
        snapshot, sample = np.divmod(start + used, len(self.sample_ids))
        self.missing[sample] = False
        rate, vectors = values[used, 0], values[used, 2:]
        norm = np.linalg.norm(vectors, axis=1) / rate
        scale = rate * self.method.norm_factor(norm)
        vectors = np.divide(vectors, scale[:, None], out=np.zeros_like(vectors), where=norm[:, None] > 0)
        self.write(_rows(self.sample_ids[sample], self.steps[snapshot], rate, norm, vectors))

    def combine(self, results: list[None]) -> None:
        return None

    def write_missing(self, dim: int) -> None:
        """A sample whose rows all count for nothing has a score too: 0."""
        ids = self.sample_ids[self.missing]
        if len(ids):
            zeros = np.zeros(len(ids))
            self.write(_rows(ids, np.full(len(ids), self.steps[0]), zeros, zeros, np.zeros((len(ids), dim))))


def _rows(ids: Any, steps: Any, rate: Any, norm: Any, projection: Any) -> Rows:
    count = len(ids)
    return {
        "step": steps,
        "timestep": np.full(count, np.nan, np.float32),
        "noise_seed": np.full(count, -1),
        "lr": rate.astype(np.float32),
        "loss": np.full(count, np.nan, np.float32),
        "weight": np.ones(count, np.float32),
        "grad_norm": norm.astype(np.float32),
        "role": np.array([split_id(sample)[1] for sample in ids.tolist()], np.int8),
        "sample": ids,
        "projection": projection.astype(np.float32),
    }
