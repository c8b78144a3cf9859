"""The family of scores. Each is one linear pass over the rows, with its own row weights.

    score[q, i] = Σ over rows r of sample i:  c_r · ⟨p_r, Q_k(r)[q]⟩
    Q_k[q]      = Σ over rows s of query q at snapshot k:  d_s · p_s

p is the projection of the unit gradient; c and d say what a method makes of lengths.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from diffhook.errors import ConfigurationError

Floats = npt.NDArray[np.floating[Any]]


class Method(ABC):
    """How a score weighs rows."""

    name: str
    formula: str
    source: str

    @abstractmethod
    def length(self, grad_norm: Floats) -> Floats:
        """(rows,) factor that stands for a gradient's length."""

    def row_weights(self, columns: Mapping[str, Floats]) -> Floats:
        """(rows,) float64 c_r; 0 for rows whose gradient is zero or not finite."""
        norm = columns["grad_norm"].astype(np.float64)
        usable = np.isfinite(norm) & (norm > 0)
        rate = columns["lr"].astype(np.float64) * columns["weight"]
        return np.where(usable, rate * self.length(np.where(usable, norm, 1.0)), 0.0)

    def query_weights(self, columns: Mapping[str, Floats]) -> Floats:
        """(rows,) float64 d_s."""
        norm = columns["grad_norm"].astype(np.float64)
        usable = np.isfinite(norm) & (norm > 0)
        return np.where(usable, columns["weight"] * self.length(np.where(usable, norm, 1.0)), 0.0)


class TracIn(Method):
    name = "tracin"
    formula = "Σ_k w_k ⟨g_i, mean_t mean_m g_q⟩"
    source = "Diffusion-TracIn, arXiv 2401.09031, after Pruthi et al. 2020"

    def length(self, grad_norm: Floats) -> Floats:
        return grad_norm


class ReTrac(Method):
    name = "retrac"
    formula = "Σ_k w_k ⟨g_i/‖g_i‖, mean_t (mean_m g_q)/‖mean_m g_q‖⟩"
    source = "Diffusion-ReTrac, arXiv 2401.09031"

    def length(self, grad_norm: Floats) -> Floats:
        return np.ones_like(grad_norm)


METHODS: dict[str, Method] = {method.name: method for method in (TracIn(), ReTrac())}


def find_method(name: str) -> Method:
    """The method of that name.

    Raises:
        ConfigurationError: there is none; names those there are.
    """
    if name not in METHODS:
        raise ConfigurationError(f"no method {name!r}; there are {', '.join(METHODS)}")
    return METHODS[name]
