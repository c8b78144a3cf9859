"""A matrix sketched through its factors, at the price of the factors.

Both sides of the matrix are count sketched to as many buckets, and bucket k of the result adds up all (p, q)
with p + q ≡ k: of an outer product g ⊗ a that is the circular convolution of the sketches of g and a, one
product in Fourier space (Pham and Pagh 2013). Inner products are kept without bias, and nearly as well as by
independent signs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from diffhook.gradients.products import is_half, mm
from diffhook.gradients.rules import Factors
from diffhook.gradients.tuning import tuner

SIZE = 512  #: numbers that a matrix is reduced to


class Signs(NamedTuple):
    """±1, int8, of a matrix (O, I)."""

    outward: Tensor  # (O,)
    inward: Tensor  # (I,)
    both: Tensor | None  # (O, I), their products, where each side has a bucket for every element

    @classmethod
    def of(cls, outward: Tensor, inward: Tensor) -> Signs:
        few = max(len(outward), len(inward)) <= SIZE
        return cls(outward, inward, torch.outer(outward, inward) if few else None)


def of_factors(factors: Factors, signs: Signs) -> Tensor:
    """(B, SIZE): the sketch of Σ_t grads[:, t] ⊗ inputs[:, t].

    Args:
        factors: (B, T, O) and (B, T, I).
    """
    left = torch.fft.rfft(_side(factors.grads, signs.outward))
    right = torch.fft.rfft(_side(factors.inputs, signs.inward))
    both = left * right
    return torch.fft.irfft(both[:, 0] if both.shape[1] == 1 else both.sum(1), n=SIZE)


def of_either(factors: Factors, product: Tensor, signs: Signs) -> Tensor:
    """The same, by the faster way where the product has been formed."""
    (_, tokens, outward), inward = factors.grads.shape, factors.inputs.shape[2]
    ways: dict[str, Callable[[], Tensor]] = {
        "factors": partial(of_factors, factors, signs),
        "product": partial(of_product, product, signs),
    }
    key = f"sketch {tokens} {inward} {outward} {factors.grads.dtype}"
    return ways[tuner(product.device).fastest(key, ways)]()


def _side(values: Tensor, signs: Tensor) -> Tensor:
    """(B, T, n) → (B, T, SIZE), the count sketch of one side; float32 of half precision.

    Of half precision by one product with a matrix of signs, which reads the numbers once and adds up in
    float32; elsewhere folded, for a tenth of the operations.
    """
    if not is_half(values):
        return _folded(values * signs)
    buckets = _buckets(values.shape[-1], values.dtype, values.device)
    return mm(values.flatten(0, 1), buckets * signs.unsqueeze(1)).unflatten(0, values.shape[:2])


@lru_cache(maxsize=64)
def _buckets(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(n, SIZE): 1 where an element goes."""
    places = torch.arange(length, device=device).remainder(SIZE).unsqueeze(1)
    return (places == torch.arange(SIZE, device=device)).to(dtype)


def of_product(product: Tensor, signs: Signs) -> Tensor:
    """The same of (B, O, I) products."""
    if signs.both is not None:
        rows, left = product, signs.both
    else:
        rows, left = product * signs.inward, signs.outward.unsqueeze(1)
        rows = _folded(rows) if rows.shape[2] > SIZE else rows
    batch, height, width = rows.shape
    filled = min(height, SIZE)
    # Rows of SIZE + 1 numbers, end to end: (p, q) lies at p · SIZE + (p + q).
    sums = product.new_zeros(batch, filled + 1, SIZE)
    ends = sums.flatten(1)[:, : filled * (SIZE + 1)].view(batch, filled, SIZE + 1)[..., :width]
    if height <= SIZE:
        torch.mul(rows, left, out=ends)
    else:
        ends.copy_(_folded(rows * left, 1))
    return sums.sum(1)


def _folded(values: Tensor, axis: int = -1) -> Tensor:
    """Along the axis, element i goes to bucket i mod SIZE; what has fewer elements is only padded."""
    length = values.shape[axis]
    if length % SIZE:
        behind = (0, 0) * (values.dim() - 1 - axis % values.dim())
        values = F.pad(values, (*behind, 0, -length % SIZE))
    return values if length <= SIZE else values.unflatten(axis, (-1, SIZE)).sum(axis % values.dim())
