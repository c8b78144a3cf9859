"""Diffusion-ReTrac: TracIn of normalised gradients."""

from __future__ import annotations

from diffhook.analysis.methods.method import Method
from diffhook.analysis.methods.registry import register


@register
class ReTrac(Method):
    """A gradient counts for its direction only, so no timestep's large norms rule."""

    name = "retrac"
    title = "ReTrac"
    formula = "Σ_k w_k ⟨g_i/‖g_i‖, mean_t (mean_m g_q)/‖mean_m g_q‖⟩"
    reference = "Diffusion-ReTrac, arXiv 2401.09031"
    unit = True
