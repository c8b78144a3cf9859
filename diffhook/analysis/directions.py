"""The query side: from rows of a query set to one direction per query and snapshot.

The order is method.md's (arXiv 2401.09031): noise is averaged at a fixed timestep, then the method
normalises, then timesteps are averaged. A row is a mean over M noise draws already; R replicates of
it, with noise of their own, are averaged here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from diffhook.analysis.leave_outs import LeaveOuts
from diffhook.analysis.methods import Method
from diffhook.log import Table

logger = logging.getLogger("diffhook")
_LISTED = 6
Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Directions:
    """Queries at snapshots.

    Attributes:
        query_ids: (Q,) int64.
        steps: (K,) int64, of the snapshots, ascending.
        whole: (K, Q, D) float64, from all replicates.
        leave_outs: L of them, which the next is by; None where noise was drawn once.
        without: (L, K, Q, D) float64; None likewise.
    """

    query_ids: npt.NDArray[np.int64]
    steps: npt.NDArray[np.int64]
    whole: Floats
    leave_outs: LeaveOuts | None
    without: Floats | None


def query_directions(table: Table, method: Method, *, own_noise: bool) -> Directions:
    """The directions of a query set, before the method transforms them.

    Args:
        own_noise: from the rows with noise of the query's own; or from those with the grid's.
    """
    rows = _Rows.read(table, own_noise)
    whole = rows.directions(method, np.ones(len(rows.replicate), np.bool_))
    replicates = len(np.unique(rows.replicate))
    if replicates < 2:
        return Directions(rows.ids, rows.steps, whole, None, None)
    leave_outs = LeaveOuts.of(rows.timestep, replicates)
    kept = leave_outs.kept(rows.timestep, rows.replicate)
    without = np.stack([rows.directions(method, each) for each in kept.T])
    return Directions(rows.ids, rows.steps, whole, leave_outs, without)


def tell_broken(table: Table, name: str) -> None:
    """Warn of a query set's rows that are not finite: they count for nothing, as if without influence."""
    broken = ~np.isfinite(table["grad_norm"])
    if not broken.any():
        return
    sample = table["sample"]
    lost = np.setdiff1d(sample, sample[~broken]).tolist()
    logger.warning(
        "%d of the %d gradients of queries %r are not finite (steps %s) and count for nothing: %s. Was the "
        "model lost by then, or is it a NaN of the query's own?",
        broken.sum(),
        len(sample),
        name,
        _listed(np.unique(table["step"][broken]).tolist()),
        f"all scores of {_listed(lost)} are 0" if lost else "every query has others",
    )


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:_LISTED])) + (" …" if len(numbers) > _LISTED else "")


@dataclass(frozen=True)
class _Rows:
    ids: npt.NDArray[np.int64]
    steps: npt.NDArray[np.int64]
    query: npt.NDArray[np.intp]
    snapshot: npt.NDArray[np.intp]
    timestep: Floats
    replicate: npt.NDArray[np.int16]
    weight: Floats
    norm: Floats
    projection: Floats

    @classmethod
    def read(cls, table: Table, own_noise: bool) -> _Rows:
        wanted = table["own_noise"] == own_noise
        columns = ("sample", "step", "timestep", "replicate", "grad_norm", "weight")
        sample, step, timestep, replicate, norm, weight = (table[name][wanted] for name in columns)
        ids, query = np.unique(sample, return_inverse=True)
        steps, snapshot = np.unique(step, return_inverse=True)
        usable = np.isfinite(norm) & (norm > 0)
        return cls(
            ids, steps, query, snapshot, timestep, replicate,
            np.where(usable, weight, 0.0),  # 1/S, shared by the replicates
            np.where(usable, norm, 1.0).astype(np.float64), table["projection"][wanted],
        )  # fmt: skip

    def directions(self, method: Method, kept: npt.NDArray[np.bool_]) -> Floats:
        """(K, Q, D) from the replicates that are kept; a timestep keeps its weight without the others.

        A gradient keeps its norm, too: that of fewer replicates is larger, for it holds more noise, and
        errors would be too small.
        """
        found = np.zeros((len(self.steps), len(self.ids), self.projection.shape[1]))
        for rows in self._timesteps():
            share = self.weight[rows].sum()
            _, length = self._mean(rows)
            mean, _ = self._mean(rows[kept[rows]])
            if length > 0:
                found[self.snapshot[rows[0]], self.query[rows[0]]] += (
                    share * method.norm_factor(np.array(length)) / length * mean
                )
        return found

    def _timesteps(self) -> Iterator[npt.NDArray[np.intp]]:
        """The rows of each snapshot, query and timestep."""
        keys = (self.replicate, self.timestep, self.query, self.snapshot)
        order = np.lexsort(keys)
        change = np.zeros(len(order), bool)
        for key in keys[1:]:
            change[1:] |= np.diff(key[order]) != 0
        yield from np.split(order, np.flatnonzero(change))

    def _mean(self, rows: npt.NDArray[np.intp]) -> tuple[Floats, float]:
        """ḡ_t and its length: exact for one row; for several, that of the mean's projection."""
        if not self.weight[rows].sum() > 0:
            return np.zeros(self.projection.shape[1]), 0.0
        shares = self.weight[rows] / self.weight[rows].sum() * self.norm[rows]
        mean = shares @ self.projection[rows].astype(np.float64)
        length = float(shares[0]) if len(rows) == 1 else float(np.linalg.norm(mean))
        return mean, length
