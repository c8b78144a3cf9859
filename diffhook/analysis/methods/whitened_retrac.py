"""ReTrac's unit directions, whitened by those of all rows."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from diffhook.analysis.methods.method import Floats, SampleSums
from diffhook.analysis.methods.registry import register
from diffhook.analysis.methods.whitening import Whitened, whitened


@register
class WhitenedReTrac(Whitened):
    """ReTrac takes out the gradients' norms, whitening also the directions that all gradients share.

    Those are large where the learning rate is high, and make the same few samples look influential for
    every query. TRAK whitens by the samples' means. This whitens by single rows, of all snapshots together:
    the empirical Fisher matrix of normalised gradients. So it also knows in which directions the noise and
    the timesteps move a sample's gradient, and where rows are few that is most of what can be known.

    Both sides are whitened: what is compared are the steps (G + λI)⁻¹ φ that the two would have taken. A
    direction of eigenvalue e counts by e/(e + λ)², most where e is λ: what is far above is shared by all,
    and what is far below is a sketch's noise. Whitened on one side, as influence functions and TRAK are, it
    counts by e/(e + λ), which predicts retrained models less well (examples/evidence/README.md). Times λ²,
    a score is the cosine of two gradients without what is shared, between −1 and 1 up to a sketch's noise.

    An event of the training is set against the query at timesteps near its own: gradients of far timesteps
    have little to do with each other, and add noise where a sample has few events.

    Args:
        ridge: λ in units of the mean eigenvalue of G. A third or three times of the default cost up to 0.04
            of LDS (examples/evidence/README.md).
    """

    name = "whitened-retrac"
    title = "whitened ReTrac"
    formula = (
        "mean_k mean over rows r of φ_q(t_r) λ² (G + λI)⁻² P g_r/‖g_r‖,  φ_q(t) = P·mean of g/‖g‖ over "
        "timesteps, for events those near t,  G = mean over all rows of P g gᵀ Pᵀ/‖g‖²,  λ = 0.1 · tr(G)/D"
    )
    reference = (
        "Diffusion-ReTrac, arXiv 2401.09031, with the kernel of TRAK, Park et al. 2023, of single rows"
    )
    unit = True
    near_timesteps = True
    requires = frozenset({"moment"})
    default_ridge = 0.1

    def rates(self, columns: Mapping[str, Floats]) -> Floats:
        return np.ones(len(columns["weight"]))

    def factors(self, samples: SampleSums) -> Floats:
        """With λ² of the whole G, whatever its blocks have: the scores' unit."""
        assert samples.moment is not None
        level = self.ridge * sum(map(np.trace, samples.moment)) / sum(map(len, samples.moment))
        return super().factors(samples) * level**2

    def transform_queries(self, directions: Floats, samples: SampleSums | None) -> Floats:
        return self.whitened_once(self.whitened_once(directions, samples), samples)

    def whitened_once(self, directions: Floats, samples: SampleSums | None) -> Floats:
        """(K, Q, D) directions times (G + λI)⁻¹, float64."""
        assert samples is not None
        assert samples.moment is not None
        rows = directions.reshape(-1, directions.shape[2])
        return whitened(rows, samples.moment, self.ridge).reshape(directions.shape)
