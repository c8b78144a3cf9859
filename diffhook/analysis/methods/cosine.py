"""Cosine TracIn: each side's time-averaged gradient is normalised once per checkpoint."""

from __future__ import annotations

import numpy as np

from diffhook.analysis.methods.method import Floats, Method, SampleSums, reciprocal
from diffhook.analysis.methods.registry import register


@register
class Cosine(Method):
    """Angles between time-averaged gradients, as the projections have them."""

    name = "cosine"
    title = "cosine"
    formula = "Σ_k w_k cos(mean_t g_i, mean_t mean_m g_q)"
    reference = "gradient aggregated similarity (GAS), Hammoudeh and Lowd 2022"
    requires = frozenset({"norm"})

    def factors(self, samples: SampleSums) -> Floats:
        assert samples.norm is not None
        return samples.rate * reciprocal(samples.norm)

    def transform_queries(self, directions: Floats, samples: SampleSums | None) -> Floats:
        return directions * reciprocal(np.linalg.norm(directions, axis=2, keepdims=True))
