"""A matrix sketched through its factors, at the price of the factors.

Both sides of the matrix are count sketched to as many buckets, and bucket k of the result adds up all (p, q)
with p + q ≡ k: of an outer product g ⊗ a that is the circular convolution of the sketches of g and a, one
product in Fourier space (Pham and Pagh 2013). Inner products are kept without bias, and nearly as well as by
independent signs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from diffhook.gradients.rules import Factors

SIZE = 512  #: numbers that a matrix is reduced to


def of_factors(factors: Factors, signs: Factors) -> Tensor:
    """(B, SIZE): the sketch of Σ_t grads[:, t] ⊗ inputs[:, t].

    Args:
        factors: (B, T, O) and (B, T, I).
        signs: (O,) and (I,).
    """
    left, right = (torch.fft.rfft(_folded(side * sign)) for side, sign in zip(factors, signs, strict=True))
    return torch.fft.irfft((left * right).sum(1), n=SIZE)


def of_product(product: Tensor, signs: Factors) -> Tensor:
    """The same of (B, O, I) products."""
    folded = _bucketed(product * signs.inputs).transpose(1, 2)
    folded = _bucketed(folded * signs.grads)  # (B, q, p), at most SIZE of each
    # Rows of SIZE + 1 numbers, end to end: (q, p) lies at q · SIZE + (q + p).
    rows = folded.shape[1]
    flat = F.pad(folded, (0, SIZE + 1 - folded.shape[2])).flatten(1)
    return F.pad(flat, (0, SIZE - rows)).view(-1, rows + 1, SIZE).sum(1)


def _bucketed(values: Tensor) -> Tensor:
    """(…, n) → (…, ≤ SIZE): element i goes to bucket i mod SIZE."""
    return values if values.shape[-1] <= SIZE else _folded(values)


def _folded(values: Tensor) -> Tensor:
    """(…, n) → (…, SIZE): element i goes to bucket i mod SIZE."""
    length = values.shape[-1]
    if length % SIZE:
        values = F.pad(values, (0, -length % SIZE))
    return values if length <= SIZE else values.unflatten(-1, (-1, SIZE)).sum(-2)
