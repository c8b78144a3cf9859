"""D-TRAK: TRAK's features from the squared output in place of the loss."""

from __future__ import annotations

from diffhook.analysis.methods.registry import register
from diffhook.analysis.methods.trak import TRAK


@register
class DTRAK(TRAK):
    """As TRAK; both sides hold gradients of the mean squared output."""

    name = "d-trak"
    title = "D-TRAK"
    formula = "as trak, with φ = P·mean_t ∇ mean(ε_θ(x_t, t)²)"
    reference = "D-TRAK, arXiv 2311.00500"
    measurement = "squared-output"
