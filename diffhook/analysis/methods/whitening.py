"""Whitening by the training samples' own features: what all samples share counts for little."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
import scipy.linalg

from diffhook.analysis.methods.method import Floats, Method, SampleSums, reciprocal
from diffhook.errors import ConfigurationError

BLOCK = 4096
"""Dimensions that are whitened together. Of more, (ΦᵀΦ + λI)⁻¹ is taken block by block along the diagonal: a
sketch's buckets are all alike, so each block is a projection by itself, and scores are their sum."""


class Whitened(Method):
    """score = mean_k φ_q (ΦᵀΦ + λI)⁻¹ φ_i over snapshots k, with Φ (N, D) the samples' features φ_i.

    A feature is a mean over the sample's rows, whatever their learning rates.

    Args:
        ridge: λ in the method's own unit, see its formula.
    """

    requires = frozenset({"sums", "gram"})
    default_ridge = 0.1

    def __init__(self, ridge: float | None = None) -> None:
        self.ridge = self.default_ridge if ridge is None else ridge
        if not self.ridge > 0:
            raise ConfigurationError(f"ridge is {ridge}; expected a positive number")

    @abstractmethod
    def unit_ridge(self, gram: Floats, samples: int) -> float:
        """λ for a ridge of 1.

        Args:
            gram: (b, b) ΦᵀΦ, or a block of it.
            samples: N, those with rows at the snapshot.
        """

    def factors(self, samples: SampleSums) -> Floats:
        return reciprocal(samples.rate) / len(samples.rate)

    def transform_queries(self, directions: Floats, samples: SampleSums | None) -> Floats:
        assert samples is not None
        assert samples.grams is not None
        found = np.zeros_like(directions, np.float64)
        for k, grams in samples.grams.items():
            for part, gram in zip(blocks(directions.shape[2]), grams, strict=True):
                ridge = self._ridge(gram, samples, k)
                if ridge > 0:  # a sample has a direction
                    ridged = gram + ridge * np.eye(len(gram))
                    found[k][:, part] = scipy.linalg.solve(ridged, directions[k][:, part].T, assume_a="pos").T
        return found

    def variance_share(self, samples: SampleSums | None, snapshots: int) -> Floats:
        """1 − h, with h the samples' mean leverage, the effective dimension over their number.

        A sample's own draws move φ_i and, through it, the kernel, which takes back h of the change: (1 − h)²
        of the variance stays. Those of the others reach it through the kernel by Σ_j (φ_i (ΦᵀΦ + λI)⁻¹ φ_j)²,
        which is about h (1 − h), for Φ (ΦᵀΦ + λI)⁻¹ Φᵀ is nearly a projection. Where samples are few for the
        dimensions, that is too much, and errors are too large.
        """
        assert samples is not None
        share = np.ones(snapshots)
        for k in samples.grams or {}:
            share[k] -= self.effective_dimension(samples, k) / max(int((samples.rate[k] > 0).sum()), 1)
        return share.clip(0)

    def effective_dimension(self, samples: SampleSums, k: int) -> float:
        """tr(ΦᵀΦ (ΦᵀΦ + λI)⁻¹) at snapshot k: how many directions the samples fill, beyond λ."""
        assert samples.grams is not None
        total = 0.0
        for gram in samples.grams[k]:
            values = np.linalg.eigvalsh(gram).clip(0)
            ridge = self._ridge(gram, samples, k)
            total += float((values / (values + ridge)).sum()) if ridge > 0 else 0.0
        return total

    def _ridge(self, gram: Floats, samples: SampleSums, k: int) -> float:
        return self.ridge * self.unit_ridge(gram, int((samples.rate[k] > 0).sum()))


def blocks(dim: int) -> list[slice]:
    """The dimensions that are whitened together."""
    return [slice(start, min(start + BLOCK, dim)) for start in range(0, dim, BLOCK)]
