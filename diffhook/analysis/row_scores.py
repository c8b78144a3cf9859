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
        centres: (C,) timesteps, ascending: a row is set against the queries' directions around the nearest.
        factors: (K, N) float32 on the rows of a sample at a snapshot; None: 1.
        directions: (K, C, Q, D) float32.
    """

    method: Method
    sample_ids: npt.NDArray[np.int64]
    steps: npt.NDArray[np.int64]
    centres: Floats
    factors: Floats | None
    directions: npt.NDArray[np.float32]

    @property
    def queries(self) -> int:
        """Q."""
        return self.directions.shape[2]

    @property
    def columns(self) -> tuple[str, ...]:
        """What is read of a row, beside its projection."""
        return ("sample", "step", "timestep", *self.method.columns)

    def __call__(self, table: Table, block: Block) -> Partial:
        sample, _, scores = self.of_rows(table, block)
        return add_rows(sample, scores)

    def of_rows(
        self, table: Table, block: Block
    ) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], npt.NDArray[np.float32]]:
        """(rows,) positions of sample and of snapshot, and (rows, Q) what each row adds to the scores."""
        columns = {c: table.read(block, c) for c in self.columns}
        sample = np.searchsorted(self.sample_ids, columns["sample"])
        snapshot = nearest(columns["step"], self.steps)
        weights = self.weights(columns, sample, snapshot)
        projection = table.read(block, "projection")
        scores = np.zeros((len(projection), self.queries), np.float32)
        against = snapshot * len(self.centres) + self.centre(columns)
        directions = self.directions.reshape(-1, *self.directions.shape[2:])
        for start in range(0, len(projection), _ROWS):
            part = slice(start, start + _ROWS)
            numbers = projection[part].astype(np.float32)
            for group in np.unique(against[part]):
                mine = against[part] == group
                if mine.all():
                    np.matmul(numbers, directions[group].T, out=scores[part])
                else:
                    scores[part][mine] = numbers[mine] @ directions[group].T
        scores *= weights[:, None].astype(np.float32)
        return sample, snapshot, scores

    def centre(self, columns: Any) -> npt.NDArray[np.intp]:
        """(rows,) position of the nearest centre."""
        if len(self.centres) == 1:
            return np.zeros(len(columns["timestep"]), np.intp)
        return nearest(np.nan_to_num(columns["timestep"]), self.centres)

    def weights(self, columns: Any, sample: npt.NDArray[np.intp], snapshot: npt.NDArray[np.intp]) -> Floats:
        """(rows,) float64: c_r · f_k(r)[i]."""
        weights = self.method.row_weights(columns)
        return weights if self.factors is None else weights * self.factors[snapshot, sample]
