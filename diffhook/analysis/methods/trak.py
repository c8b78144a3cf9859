"""TRAK: ridge regression over the projected, time-averaged gradients."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from diffhook.analysis.methods.method import Floats, Method, SampleSums, reciprocal
from diffhook.analysis.methods.registry import register
from diffhook.errors import ConfigurationError


@register
class TRAK(Method):
    """Features φ = P·mean_t g, whitened by the training samples' own.

    Args:
        ridge: λ in units of the mean eigenvalue of ΦᵀΦ: λ = ridge · tr(ΦᵀΦ) / D, at each checkpoint.
    """

    name = "trak"
    formula = "mean_k φ_q (ΦᵀΦ + λI)⁻¹ φ_i,  φ = P·mean_t g,  λ = 0.1 · tr(ΦᵀΦ)/D"
    source = "TRAK, Park et al. 2023; for diffusion models arXiv 2311.00500"
    wants = frozenset({"sums", "gram"})

    def __init__(self, ridge: float = 0.1) -> None:
        if not ridge > 0:
            raise ConfigurationError(f"ridge is {ridge}; expected a positive number")
        self.ridge = ridge

    def length(self, norm: Floats) -> Floats:
        return norm

    def rates(self, columns: Mapping[str, Floats]) -> Floats:
        return columns["weight"].astype(np.float64)  # a mean over rows, whatever their learning rates

    def factors(self, samples: SampleSums) -> Floats:
        return reciprocal(samples.rate) / len(samples.rate)

    def turn(self, directions: Floats, samples: SampleSums | None) -> Floats:
        assert samples is not None
        assert samples.gram is not None
        turned = np.zeros_like(directions, np.float64)
        for k, gram in enumerate(samples.gram):
            ridge = self.ridge * np.trace(gram) / len(gram)
            if ridge > 0:  # a checkpoint with rows
                turned[k] = np.linalg.solve(gram + ridge * np.eye(len(gram)), directions[k].T).T
        return turned
