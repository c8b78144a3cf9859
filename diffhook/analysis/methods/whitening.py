"""Whitening by the training samples' own gradients: what all of them share counts for little."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import scipy.linalg

from diffhook.analysis.methods.method import Floats, Method, SampleSums, reciprocal
from diffhook.errors import ConfigurationError

BLOCK = 4096
"""Dimensions that are whitened together. Of more, (G + λI)⁻¹ is taken block by block along the diagonal: a
sketch's buckets are all alike, so each block is a projection by itself, and scores are their sum."""


class Whitened(Method):
    """score = mean_k φ_q (G + λI)⁻¹ φ_i over snapshots k, with φ_i the mean over the sample's rows.

    Rows count alike, whatever their learning rates. A method says what G is, and may whiten twice.

    Args:
        ridge: λ in units of G's mean eigenvalue.
    """

    default_ridge: float

    def __init__(self, ridge: float | None = None) -> None:
        self.ridge = self.default_ridge if ridge is None else ridge
        if not self.ridge > 0:
            raise ConfigurationError(f"ridge is {ridge}; expected a positive number")

    def factors(self, samples: SampleSums) -> Floats:
        return reciprocal(samples.rate) / len(samples.rate)


def whitened(directions: Floats, grams: Sequence[Floats], ridge: float) -> Floats:
    """(rows, D) directions times (G + λI)⁻¹, float64; 0 where G is.

    Args:
        grams: the :func:`blocks` of G.
        ridge: λ over a block's mean eigenvalue.
    """
    return _by_block(directions, grams, ridge, partial(scipy.linalg.solve, assume_a="pos"))


def half_whitened(directions: Floats, grams: Sequence[Floats], ridge: float) -> Floats:
    """(rows, D) directions u times a root of (G + λI)⁻¹, float64: the product of two is uᵀ (G + λI)⁻¹ v.
    Arguments as for :func:`whitened`."""
    return _by_block(directions, grams, ridge, _by_root)


def _by_root(ridged: Floats, columns: Floats) -> Floats:
    root = np.linalg.cholesky(ridged)
    found: Floats = scipy.linalg.solve_triangular(root, columns, lower=True)
    return found


def _by_block(
    directions: Floats, grams: Sequence[Floats], ridge: float, solve: Callable[[Floats, Floats], Floats]
) -> Floats:
    found = np.zeros(directions.shape)
    for part, gram in zip(blocks(directions.shape[1]), grams, strict=True):
        level = ridge * np.trace(gram) / len(gram)
        if level > 0:
            found[:, part] = solve(gram + level * np.eye(len(gram)), directions[:, part].T).T
    return found


def effective_dimension(grams: Sequence[Floats], ridge: float) -> float:
    """tr(G (G + λI)⁻¹): how many directions G fills, beyond λ. Arguments as of :func:`whitened`."""
    total = 0.0
    for gram in grams:
        values, level = np.linalg.eigvalsh(gram).clip(0), ridge * np.trace(gram) / len(gram)
        total += float((values / (values + level)).sum()) if level > 0 else 0.0
    return total


def blocks(dim: int) -> list[slice]:
    """The dimensions that are whitened together."""
    return [slice(start, min(start + BLOCK, dim)) for start in range(0, dim, BLOCK)]
