"""Which draws of noise a jackknife leaves out, on the queries' side and on the grid's alike.

Each timestep has R replicates of its noise, and no two timesteps share any, so a replicate of one may be left
out with any replicate of another. Of R = 2 one such pairing gives an error with a single degree of freedom,
whose interval says nothing; several pairings that are orthogonal over timesteps (rows of a Hadamard matrix,
as in balanced repeated replication, McCarthy 1969) give one each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.linalg

# So a 95% interval is 2.8 errors on either side, not 12.7; each takes two more passes' products.
_PAIRINGS = 4


@dataclass(frozen=True)
class LeaveOuts:
    """Leave-out ``g · R + r`` is, of pairing g, without replicate ``(r + shifts[g, t]) mod R`` at timestep t.

    Attributes:
        timesteps: (S,) ascending.
        replicates: R.
        shifts: (G, S) int.
    """

    timesteps: npt.NDArray[Any]
    replicates: int
    shifts: npt.NDArray[np.intp]

    @classmethod
    def of(cls, timesteps: npt.NDArray[Any], replicates: int) -> LeaveOuts:
        """For a grid's timesteps, each with so many replicates, 2 or more."""
        distinct = np.unique(timesteps)
        count = len(distinct)
        pairings = min(_PAIRINGS, count) if replicates == 2 else 1
        size = max(1 << (count - 1).bit_length(), _PAIRINGS)
        signs = scipy.linalg.hadamard(size)[:pairings, :count]
        return cls(distinct, replicates, (signs < 0).astype(np.intp))

    @property
    def count(self) -> int:
        """G · R."""
        return self.shifts.size // len(self.timesteps) * self.replicates

    def kept(self, timestep: npt.NDArray[Any], replicate: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """(rows, G · R) whether a row is in a leave-out."""
        at = np.searchsorted(self.timesteps, timestep).clip(max=len(self.timesteps) - 1)
        gone = (np.arange(self.replicates)[:, None] + self.shifts[:, None, at]) % self.replicates
        found: npt.NDArray[np.bool_] = (gone != replicate).reshape(self.count, -1).T
        return found

    def variance(self, without: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """(n, Q) the jackknife's variance, the mean over pairings, of (n, G · R, Q) leave-outs."""
        parts = without.reshape(len(without), len(self.shifts), self.replicates, -1)
        spread = np.square(parts - parts.mean(2, keepdims=True)).sum(2)
        found: npt.NDArray[Any] = spread.mean(1) * (self.replicates - 1) / self.replicates
        return found

    @property
    def freedom(self) -> int:
        """Degrees of freedom of the variance."""
        return len(self.shifts) * (self.replicates - 1)
