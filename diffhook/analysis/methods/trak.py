"""TRAK: ridge regression over the projected, time-averaged gradients."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from diffhook.analysis.methods.method import Floats
from diffhook.analysis.methods.registry import register
from diffhook.analysis.methods.whitening import Whitened


@register
class TRAK(Whitened):
    """Features φ = P·mean_t g, whitened by the training samples' own.

    Args:
        ridge: λ in units of the mean eigenvalue of ΦᵀΦ: λ = ridge · tr(ΦᵀΦ) / D, at each snapshot.
    """

    name = "trak"
    title = "TRAK"
    formula = "mean_k φ_q (ΦᵀΦ + λI)⁻¹ φ_i,  φ = P·mean_t g,  λ = 0.1 · tr(ΦᵀΦ)/D"
    source = "TRAK, Park et al. 2023; for diffusion models arXiv 2311.00500"

    def unit_ridge(self, gram: Floats, samples: int) -> float:
        return float(np.trace(gram)) / len(gram)

    def rates(self, columns: Mapping[str, Floats]) -> Floats:
        return columns["weight"].astype(np.float64)
