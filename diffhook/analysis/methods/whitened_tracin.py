"""TracIn, whitened by the unit gradients of all rows."""

from __future__ import annotations

import numpy as np

from diffhook.analysis.methods.method import Floats
from diffhook.analysis.methods.registry import register
from diffhook.analysis.methods.whitened_retrac import WhitenedReTrac


@register
class WhitenedTracIn(WhitenedReTrac):
    """The kernel of :class:`WhitenedReTrac` between gradients that keep their norms.

    A sample with larger gradients moves the model further, and a query's loss counts most where its own
    gradient is large: on the grid, where all samples have the same timesteps and noise, that predicts
    retrained models better than directions alone. From the training's events the norm tells of the timestep
    that a sample happened to draw, too, as TracIn's does. G is of unit gradients, or the few rows with the
    largest norms would make most of it.

    Args:
        ridge: λ in units of the mean eigenvalue of G. The default was chosen on the MLP of
            examples/evidence.
    """

    name = "whitened-tracin"
    title = "whitened TracIn"
    formula = (
        "mean_k mean over rows r of φ_q(t_r) (G + λI)⁻¹ P g_r,  φ_q(t) = P·mean of g over timesteps, for "
        "events those near t,  G = mean over all rows of P g gᵀ Pᵀ/‖g‖²,  λ = 0.01 · tr(G)/D"
    )
    reference = "Diffusion-TracIn, arXiv 2401.09031, with the kernel of whitened ReTrac"
    unit = False
    default_ridge = 0.01

    def moment_factor(self, norm: Floats) -> Floats:
        return np.ones_like(norm)
