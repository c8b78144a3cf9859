"""The query side: from rows of a query set to a direction per query and snapshot.

In the order of arXiv 2401.09031: noise is averaged at a fixed timestep, then the method normalises, then
timesteps are averaged. A row is a mean over M noise draws already; R replicates of it, with noise of their
own, are averaged here. For methods that set a row against the timesteps near its own there are several
averages, each around another timestep.
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
CENTRES = 8
"""Timesteps around which a query's gradients are averaged, evenly spaced over those of its grid, by Gaussian
weights one spacing wide. More would cost memory, and timesteps so near tell much the same."""
Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Directions:
    """Queries at snapshots.

    Attributes:
        query_ids: (Q,) int64.
        steps: (K,) int64, of the snapshots, ascending.
        centres: (C,) float64, the timesteps around which gradients are averaged, ascending; (1,) where all
            count alike.
        whole: (K, C, Q, D) float64, from all replicates.
        leave_outs: L of them, which the next is by; None where noise was drawn once.
        without: (L, K, C, Q, D) float64; None likewise.
    """

    query_ids: npt.NDArray[np.int64]
    steps: npt.NDArray[np.int64]
    centres: Floats
    whole: Floats
    leave_outs: LeaveOuts | None
    without: Floats | None


def query_directions(table: Table, method: Method, *, own_noise: bool) -> Directions:
    """The directions of a query set, before the method transforms them.

    Args:
        own_noise: from the rows with noise of the query's own, for the training's events; or from those with
            the grid's.
    """
    rows = _Rows.read(table, own_noise)
    nearness = Nearness.over(rows.timestep, CENTRES if own_noise and method.near_timesteps else 1)
    whole = rows.directions(method, nearness, np.ones(len(rows.replicate), np.bool_))
    replicates = len(np.unique(rows.replicate))
    if replicates < 2:
        return Directions(rows.ids, rows.steps, nearness.centres, whole, None, None)
    leave_outs = LeaveOuts.of(rows.timestep, replicates)
    kept = leave_outs.kept(rows.timestep, rows.replicate)
    without = np.stack([rows.directions(method, nearness, each) for each in kept.T])
    return Directions(rows.ids, rows.steps, nearness.centres, whole, leave_outs, without)


@dataclass(frozen=True)
class Nearness:
    """How much a query's gradients at each timestep count around each of C centres.

    Attributes:
        centres: (C,) timesteps, ascending.
        timesteps: (S,) of the queries' grid, ascending.
        factors: (C, S), with mean 1 over timesteps.
    """

    centres: Floats
    timesteps: Floats
    factors: Floats

    @classmethod
    def over(cls, timesteps: Floats, count: int) -> Nearness:
        """With so many centres; one where all timesteps count alike, or there is but one."""
        distinct = np.unique(timesteps).astype(np.float64)
        if count == 1 or len(distinct) < 2:
            return cls(distinct[:1], distinct, np.ones((1, len(distinct))))
        centres = np.linspace(distinct[0], distinct[-1], count)
        apart = (centres[:, None] - distinct) / (centres[1] - centres[0])
        shares = np.exp(-np.square(apart) / 2)
        return cls(centres, distinct, shares / shares.mean(1, keepdims=True))

    def at(self, timestep: Any) -> Floats:
        """(C,) the factors of one of the timesteps."""
        return self.factors[:, np.searchsorted(self.timesteps, timestep)]


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

    def directions(self, method: Method, nearness: Nearness, kept: npt.NDArray[np.bool_]) -> Floats:
        """(K, C, Q, D) from the replicates that are kept; a timestep keeps its weight without the others.

        A gradient keeps its norm, too: that of fewer replicates is larger, for it holds more noise, and
        errors would be too small.
        """
        sizes = len(self.steps), len(nearness.centres), len(self.ids), self.projection.shape[1]
        found = np.zeros(sizes)
        for rows in self._timesteps():
            share = self.weight[rows].sum()
            _, length = self._mean(rows)
            mean, _ = self._mean(rows[kept[rows]])
            if length > 0:
                factors = share * nearness.at(self.timestep[rows[0]])
                found[self.snapshot[rows[0]], :, self.query[rows[0]]] += (
                    factors[:, None] * method.norm_factor(np.array(length)) / length * mean
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
