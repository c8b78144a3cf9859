"""ReTrac's unit directions, whitened by the training samples' own."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from diffhook.analysis.methods.method import Floats
from diffhook.analysis.methods.registry import register
from diffhook.analysis.methods.whitening import Whitened


@register
class WhitenedReTrac(Whitened):
    """ReTrac takes out the gradients' norms, whitening also the directions that all samples share.

    Those are large where the learning rate is high, and make the same few samples look influential for
    every query. TRAK is the same with gradients of their own norms.

    Args:
        ridge: λ in units of the samples' mean tr(ΦᵀΦ) / N, at each snapshot. By default what predicted best
            on three small models (examples/evidence/lds.py); a third or three times of it cost little.
    """

    name = "whitened-retrac"
    title = "whitened ReTrac"
    formula = "mean_k φ_q (ΦᵀΦ + λI)⁻¹ φ_i,  φ = P·mean over rows of g/‖g‖,  λ = 0.03 · tr(ΦᵀΦ)/N"
    source = "Diffusion-ReTrac, arXiv 2401.09031, with the kernel of TRAK, Park et al. 2023"
    unit = True
    default_ridge = 0.03

    def unit_ridge(self, gram: Floats, samples: int) -> float:
        return float(np.trace(gram)) / max(samples, 1)

    def rates(self, columns: Mapping[str, Floats]) -> Floats:
        return np.ones(len(columns["weight"]))
