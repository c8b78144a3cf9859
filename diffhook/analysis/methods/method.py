"""What a method is. Each is one linear pass over the rows, with its own weights.

    score[q, i] = Σ over rows r of sample i:  c_r · f_k(r)[i] · ⟨p_r, Q_k(r)[q]⟩
    Q_k[q]      = transform_queries( 1/|S| Σ over timesteps t:  κ · norm_factor(‖ḡ_t‖) · ḡ_t / ‖ḡ_t‖ )
    ḡ_t         = mean_m g_q

p is the projection of the unit gradient. c and ``norm_factor`` say what a method makes of gradients' norms, f
and ``transform_queries`` what it makes of the other training samples. κ is 1, or with ``near_timesteps`` and
training events the larger, the nearer t is to the row's own timestep.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class SampleSums:
    """The training samples' own sums at each snapshot k: v = Σ_r ω_r · norm_factor(‖g_r‖) · p_r.

    Attributes:
        rate: (K, N) Σ_r ω_r; 0 where the sample has no rows.
        norm: (K, N) ‖v‖; None where a method does not require it, as the others.
        grams: k → Σ_i φ_i φ_iᵀ of the means φ = v / rate, as its square blocks along the diagonal (see
            :func:`~diffhook.analysis.methods.whitening.blocks`); without the snapshots that have no rows.
        moment: the mean over rows of φ_r φ_rᵀ with φ_r = norm_factor(‖g_r‖) · p_r, of all snapshots, as such
            blocks; see :mod:`diffhook.analysis.second_moment`.
        residual: (N,) mean of √loss over √ of the mean loss, of the sample's rows.
    """

    rate: Floats
    norm: Floats | None = None
    grams: Mapping[int, list[Floats]] | None = None
    moment: list[Floats] | None = None
    residual: Floats | None = None


class Method(ABC):
    """How a score weighs rows.

    Attributes:
        name: what a user calls it.
        title: what tables and pages call it.
        formula, reference: for ``--method help``.
        measurement: the scalar whose gradients both sides must hold.
        unit: whether a gradient counts for its direction only.
        preconditioned: whether the queries' gradients must be divided by Adam's √v̂ + ε. Those of the
            training rows never are.
        near_timesteps: whether an event of the training, which drew one timestep, is set against the query's
            gradients at timesteps near it; otherwise against their mean over all. On a grid the mean counts.
        columns: what of a row, beside its projection, its weight depends on.
        requires: what of :class:`SampleSums` it needs beside rates, of "norm", "grams", "moment" and
            "residual"; nothing: no first pass.
    """

    name: str
    title: str
    formula: str
    reference: str
    measurement = "loss"
    unit = False
    preconditioned = False
    near_timesteps = False
    columns: tuple[str, ...] = ("lr", "weight", "grad_norm", "own_noise")
    requires: frozenset[str] = frozenset()

    @property
    def additive(self) -> bool:
        """Whether a score is a sum over rows, each weighed by itself; then a sample has one on itself."""
        return not self.requires and not self.preconditioned

    @property
    def summable(self) -> bool:
        """Whether a sample's rows may be summed up beforehand, as by ``diffhook compact --aggregate``: the
        score is additive, and weighs rows by lr · weight alone. A sum has no timesteps any more."""
        own = type(self).rates is not Method.rates or type(self).row_weights is not Method.row_weights
        return self.additive and not own and set(self.columns) <= set(Method.columns)

    def norm_factor(self, norm: Floats) -> Floats:
        """(rows,) factor that stands for a gradient's norm."""
        return np.ones_like(norm) if self.unit else norm

    def factors(self, samples: SampleSums) -> Floats | None:
        """(K, N) factor on a sample's rows at a snapshot; None: 1."""
        return None

    def transform_queries(self, directions: Floats, samples: SampleSums | None) -> Floats:
        """(K, Q, D) query directions, as the training rows are to be multiplied by."""
        return directions

    def variance_share(self, samples: SampleSums | None, snapshots: int) -> Floats:
        """(K,) how much of the variance that a sample's own draws give its rows reaches its score."""
        return np.ones(snapshots)

    def row_weights(self, columns: Mapping[str, Floats]) -> Floats:
        """(rows,) float64 c_r; 0 for rows whose gradient is zero or not finite, or that have noise of their
        own (of query sets, as the source): on a grid, noise is shared."""
        norm = columns["grad_norm"].astype(np.float64)
        usable = np.isfinite(norm) & (norm > 0) & (columns["own_noise"] == 0)
        return np.where(usable, self.rates(columns) * self.norm_factor(np.where(usable, norm, 1.0)), 0.0)

    def rates(self, columns: Mapping[str, Floats]) -> Floats:
        """(rows,) float64 ω_r: the weight of a row in its sample's sums; by default lr · weight."""
        return columns["lr"].astype(np.float64) * columns["weight"]


def reciprocal(values: Floats) -> Floats:
    """1 / value, and 0 for 0."""
    return np.divide(1.0, values, out=np.zeros(np.shape(values)), where=values > 0)
