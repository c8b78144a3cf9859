"""DAS: TRAK's kernel on directions of the mean output's gradient, times the sample's residual."""

from __future__ import annotations

import numpy as np

from diffhook.analysis.methods.method import Floats, SampleSums
from diffhook.analysis.methods.registry import register
from diffhook.analysis.methods.trak import TRAK


@register
class DAS(TRAK):
    """As TRAK; both sides hold gradients of the mean output, of which each timestep counts by its direction.

    As the authors' code computes it: gradients are normalised at each timestep, then averaged; a
    residual is the mean over timesteps of √loss, of a sample whose losses have mean 1. Of the paper's
    formula this leaves out the leverage 1/(1 − φ_iᵀ(ΦᵀΦ)⁻¹φ_i), and the square, which would hide the sign.
    """

    name = "das"
    title = "DAS"
    formula = (
        "r_i · trak's, with φ = P·mean_t g/‖g‖, g = ∇ mean(ε_θ(x_t, t)),  r_i = mean_t √ℓ_t / √(mean_t ℓ_t)"
    )
    reference = "diffusion attribution score, arXiv 2410.18639, without its leverage term and square"
    measurement = "mean-output"
    unit = True
    requires = frozenset({"grams", "residual"})

    def factors(self, samples: SampleSums) -> Floats:
        assert samples.residual is not None
        factors: Floats = super().factors(samples) * np.asarray(samples.residual)
        return factors
