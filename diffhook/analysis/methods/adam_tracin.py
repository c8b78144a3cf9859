"""TracIn of the step that Adam takes, in place of one of plain gradient descent."""

from __future__ import annotations

from diffhook.analysis.methods.registry import register
from diffhook.analysis.methods.tracin import TracIn


@register
class AdamTracIn(TracIn):
    """As TracIn; the queries hold P_k ḡ in place of ḡ, with P = diag 1/(√v̂ + ε) at the snapshot.

    Adam moves θ by −lr · m̂/(√v̂ + ε). With v̂ held fixed, what sample i adds to that, over the steps
    for which momentum remembers it (its weights (1 − β₁) β₁ʲ sum up to 1), is −lr · w · P g_i. This
    lowers a query's loss by lr · w · ⟨P g_i, g_q⟩ = lr · w · ⟨g_i, P g_q⟩, for P is diagonal. So it is
    enough to divide on the queries' side: any training rows serve, and stay as they are.

    Left out of the paper's AdamW-influence: the sample's own part in v̂, weight decay, and what later
    steps make of the change.
    """

    name = "adam-tracin"
    title = "Adam TracIn"
    formula = "Σ_k w_k ⟨g_i, P_k mean_t mean_m g_q⟩,  P_k = diag 1/(√v̂_k + ε) of the optimiser"
    reference = "TracIn with the push of AdamW-influence, arXiv 2605.18814, without its later steps"
    preconditioned = True
