"""What a query loses with each sample that is left out, once others have been left out already."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.linalg

Floats = npt.NDArray[np.floating[Any]]


@dataclass
class Remaining:
    """Candidates of a query in one block of dimensions; see :mod:`diffhook.analysis.influential_subset`.

    With W the rows of all candidates, A = G + λI of all rows and E = I − W A⁻¹ Wᵀ / R, samples S take
    predicted_S E_SS⁻¹ shares_S from the query. All three are kept as they are without the samples that were
    chosen, as Schur complements: by a Cholesky decomposition of E that goes on sample by sample, and of which
    only the chosen samples' rows are ever computed.

    Attributes:
        rows: (C, T, D) float32 W A^(−1/2) / √R of each candidate; unused ones are 0.
        predicted: (C, T, P) float64 of P query directions times A⁻¹ Wᵀ.
        shares: (C, T, P) float64 with which rows count, each against its own query direction.
    """

    rows: npt.NDArray[np.float32]
    predicted: Floats
    shares: Floats
    own: Floats = field(init=False)  # (C, T, T) E of each candidate with itself
    left_out: list[Floats] = field(init=False, default_factory=list)  # (C, T, T) columns of its root

    def __post_init__(self) -> None:
        products = np.matmul(self.rows, self.rows.swapaxes(1, 2)).astype(np.float64)
        self.own = np.eye(products.shape[1]) - products

    def gains(self) -> Floats:
        """(C,) what leaving out each would take from the query now; 0 of those that are left out."""
        found: Floats = np.einsum("ctp,ctp->c", self.predicted, np.linalg.solve(self.own, self.shares))
        return found

    def leave_out(self, candidate: int) -> None:
        """Leave out another one."""
        root = np.linalg.cholesky(self.own[candidate])
        count, size, _ = self.rows.shape
        flat = self.rows.reshape(count * size, -1)
        theirs = -(flat @ self.rows[candidate].T).astype(np.float64)
        theirs[candidate * size : (candidate + 1) * size] += np.eye(size)
        for before in self.left_out:
            theirs -= before.reshape(count * size, -1) @ before[candidate].T
        theirs = _solved(root, theirs.T).T.reshape(count, size, size)
        for kept in (self.predicted, self.shares):
            kept -= theirs @ _solved(root, kept[candidate])
        self.own -= theirs @ theirs.swapaxes(1, 2)
        self.own[candidate] = np.eye(size)
        self.predicted[candidate] = self.shares[candidate] = 0
        self.left_out.append(theirs)


def _solved(root: Floats, columns: Floats) -> Floats:
    found: Floats = scipy.linalg.solve_triangular(root, columns, lower=True)
    return found
