"""ReTrac with query gradients as Adam would follow them."""

from __future__ import annotations

from diffhook.analysis.methods.registry import register
from diffhook.analysis.methods.retrac import ReTrac


@register
class AdamReTrac(ReTrac):
    """As ReTrac; the queries hold P_k ḡ in place of ḡ, see :class:`AdamTracIn`.

    Each side is normalised as it is stored: P g_i has no length of its own here.
    """

    name = "adam-retrac"
    title = "Adam ReTrac"
    formula = "Σ_k w_k ⟨g_i/‖g_i‖, mean_t (P_k mean_m g_q)/‖P_k mean_m g_q‖⟩,  P_k as in adam-tracin"
    reference = "Diffusion-ReTrac, arXiv 2401.09031, with the push of arXiv 2605.18814"
    preconditioned = True
