"""TRAK: ridge regression over the projected, time-averaged gradients."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from diffhook.analysis.methods.method import Floats, SampleSums
from diffhook.analysis.methods.registry import register
from diffhook.analysis.methods.whitening import Whitened, effective_dimension, whitened


@register
class TRAK(Whitened):
    """Features φ = P·mean_t g, whitened by the training samples' own at each snapshot.

    Args:
        ridge: λ in units of the mean eigenvalue of ΦᵀΦ: λ = ridge · tr(ΦᵀΦ) / D.
    """

    name = "trak"
    title = "TRAK"
    formula = "mean_k φ_q (ΦᵀΦ + λI)⁻¹ φ_i,  φ = P·mean_t g,  λ = 0.1 · tr(ΦᵀΦ)/D"
    reference = "TRAK, Park et al. 2023; for diffusion models arXiv 2311.00500"
    requires = frozenset({"grams"})
    default_ridge = 0.1

    def rates(self, columns: Mapping[str, Floats]) -> Floats:
        return columns["weight"].astype(np.float64)

    def transform_queries(self, directions: Floats, samples: SampleSums | None) -> Floats:
        assert samples is not None
        assert samples.grams is not None
        found = np.zeros_like(directions, np.float64)
        for k, grams in samples.grams.items():
            found[k] = whitened(directions[k], grams, self.ridge)
        return found

    def variance_share(self, samples: SampleSums | None, snapshots: int) -> Floats:
        """1 − h, with h the samples' mean leverage, the effective dimension over their number.

        A sample's own draws move φ_i and, through it, the kernel, which takes back h of the change: (1 − h)²
        of the variance stays. Those of the others reach it through the kernel by Σ_j (φ_i (ΦᵀΦ + λI)⁻¹ φ_j)²,
        which is about h (1 − h), for Φ (ΦᵀΦ + λI)⁻¹ Φᵀ is nearly a projection. Where samples are few for the
        dimensions, that is too much, and errors are too large.
        """
        assert samples is not None
        share = np.ones(snapshots)
        for k, grams in (samples.grams or {}).items():
            share[k] -= effective_dimension(grams, self.ridge) / max(int((samples.rate[k] > 0).sum()), 1)
        return share.clip(0)
