"""Diffusion-TracIn; with probe rows, TracIn on a grid of timesteps at checkpoints."""

from __future__ import annotations

from diffhook.analysis.methods.method import Method
from diffhook.analysis.methods.registry import register


@register
class TracIn(Method):
    """Dot products of gradients, summed over checkpoints."""

    name = "tracin"
    title = "TracIn"
    formula = "Σ_k w_k ⟨g_i, mean_t mean_m g_q⟩"
    reference = "Diffusion-TracIn, arXiv 2401.09031; TracIn, Pruthi et al. 2020"
