"""What each row of a block adds to the scores: rows against query directions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from diffhook.analysis.grouped import Partial, add_rows
from diffhook.analysis.methods import Method
from diffhook.analysis.tables import nearest
from diffhook.log import Block, Table

Floats = npt.NDArray[np.floating[Any]]

_ROWS = 2048  # of a block converted to float32 at once


@dataclass(frozen=True)
class RowScores:
    """Scores the rows of one block against all queries.

    Attributes:
        factors: (K, N) float32 on the rows of a sample at a snapshot; None: 1.
        directions: (K, Q, D) float32.
    """

    method: Method
    sample_ids: npt.NDArray[np.int64]
    steps: npt.NDArray[np.int64]
    factors: Floats | None
    directions: npt.NDArray[np.float32]

    def __call__(self, table: Table, block: Block) -> Partial:
        sample, _, scores = self.of_rows(table, block)
        return add_rows(sample, scores)

    def of_rows(
        self, table: Table, block: Block
    ) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], npt.NDArray[np.float32]]:
        """(rows,) positions of sample and of snapshot, and (rows, Q) what each row adds to the scores."""
        columns = {c: table.read(block, c) for c in ("sample", "step", *self.method.columns)}
        sample = np.searchsorted(self.sample_ids, columns["sample"])
        snapshot = nearest(columns["step"], self.steps)
        weights = self.weights(columns, sample, snapshot)
        projection = table.read(block, "projection")
        scores = np.zeros((len(projection), self.directions.shape[1]), np.float32)
        for start in range(0, len(projection), _ROWS):
            part = slice(start, start + _ROWS)
            numbers = projection[part].astype(np.float32)
            for k in np.unique(snapshot[part]):
                mine = snapshot[part] == k
                if mine.all():
                    np.matmul(numbers, self.directions[k].T, out=scores[part])
                else:
                    scores[part][mine] = numbers[mine] @ self.directions[k].T
        scores *= weights[:, None].astype(np.float32)
        return sample, snapshot, scores

    def weights(self, columns: Any, sample: npt.NDArray[np.intp], snapshot: npt.NDArray[np.intp]) -> Floats:
        """(rows,) float64: c_r · f_k(r)[i]."""
        weights = self.method.row_weights(columns)
        return weights if self.factors is None else weights * self.factors[snapshot, sample]
