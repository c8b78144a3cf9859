"""DAS: TRAK's kernel on the gradient of the mean output, times the sample's residual."""

from __future__ import annotations

import numpy as np

from diffhook.analysis.methods.method import Floats, SampleSums
from diffhook.analysis.methods.registry import register
from diffhook.analysis.methods.trak import TRAK


@register
class DAS(TRAK):
    """As TRAK; both sides hold gradients of the mean output. Without the paper's leverage term."""

    name = "das"
    formula = "r_i · trak's, with φ = P·mean_t ∇ mean(ε_θ(x_t, t)),  r_i = √(mean loss of i)"
    source = "diffusion attribution score, arXiv 2410.18639"
    measurement = "mean-output"
    wants = frozenset({"sums", "gram", "residual"})

    def factors(self, samples: SampleSums) -> Floats:
        assert samples.residual is not None
        factors: Floats = super().factors(samples) * np.asarray(samples.residual)
        return factors
