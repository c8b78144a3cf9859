"""What a method is. Each is one linear pass over the rows, with its own weights.

    score[q, i] = Σ over rows r of sample i:  c_r · f_k(r)[i] · ⟨p_r, Q_k(r)[q]⟩
    Q_k[q]      = turn( 1/|S| Σ over timesteps t:  length(‖ḡ_t‖) · ḡ_t / ‖ḡ_t‖ ),  ḡ_t = mean_m g_q

p is the projection of the unit gradient. c and ``length`` say what a method makes of lengths, f and
``turn`` what it makes of the other training samples.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class SampleSums:
    """The training samples' own sums at each snapshot k: v = Σ_r ω_r · length(‖g_r‖) · p_r.

    Attributes:
        rate: (K, N) Σ_r ω_r; 0 where the sample has no rows.
        norm: (K, N) ‖v‖.
        gram: (K, D, D) Σ_i φ_i φ_iᵀ of the means φ = v / rate; where a method wants it.
        residual: (N,) mean of √loss over √ of the mean loss, of the sample's rows; where a method wants it.
    """

    rate: Floats
    norm: Floats
    gram: Floats | None
    residual: Floats | None


class Method(ABC):
    """How a score weighs rows.

    Attributes:
        name: what a user calls it.
        formula, source: for ``--method help``.
        measurement: the scalar whose gradients both sides must hold.
        preconditioned: whether the queries' gradients must be divided by Adam's √v̂ + ε. Those of the
            training rows never are.
        columns: what of a row, beside its projection, its weight depends on.
        wants: what of :class:`SampleSums` it needs, of "sums", "gram" and "residual"; nothing: no first pass.
    """

    name: str
    formula: str
    source: str
    measurement = "loss"
    preconditioned = False
    columns: tuple[str, ...] = ("lr", "weight", "grad_norm", "own_noise")
    wants: frozenset[str] = frozenset()

    @abstractmethod
    def length(self, norm: Floats) -> Floats:
        """(rows,) factor that stands for a gradient's length."""

    def factors(self, samples: SampleSums) -> Floats | None:
        """(K, N) factor on a sample's rows at a snapshot; None: 1."""
        return None

    def turn(self, directions: Floats, samples: SampleSums | None) -> Floats:
        """(K, Q, D) query directions, as the training rows are to be multiplied by."""
        return directions

    def row_weights(self, columns: Mapping[str, Floats]) -> Floats:
        """(rows,) float64 c_r; 0 for rows whose gradient is zero or not finite, or that have noise of their
        own (of query sets, as the source): on a grid, noise is shared."""
        norm = columns["grad_norm"].astype(np.float64)
        usable = np.isfinite(norm) & (norm > 0) & (columns["own_noise"] == 0)
        return np.where(usable, self.rates(columns) * self.length(np.where(usable, norm, 1.0)), 0.0)

    def rates(self, columns: Mapping[str, Floats]) -> Floats:
        """(rows,) float64 ω_r: the weight of a row in its sample's sums; by default lr · weight."""
        return columns["lr"].astype(np.float64) * columns["weight"]


def reciprocal(values: Floats) -> Floats:
    """1 / value, and 0 for 0."""
    return np.divide(1.0, values, out=np.zeros(np.shape(values)), where=values > 0)
