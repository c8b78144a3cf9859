"""A matrix sketched through its factors, at the price of the factors.

Both sides of the matrix are count sketched to as many buckets, and bucket k of the result adds up all (p, q)
with p + q ≡ k: of an outer product g ⊗ a that is the circular convolution of the sketches of g and a, one
product in Fourier space (Pham and Pagh 2013). Inner products are kept without bias, and nearly as well as by
independent signs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor
from torch.nn import functional as F

from diffhook.gradients.products import is_half, mm
from diffhook.gradients.rules import Factors
from diffhook.gradients.tuning import tuner

SIZE = 512  #: numbers that a matrix is reduced to


def of_factors(factors: Factors, signs: Factors) -> Tensor:
    """(B, SIZE): the sketch of Σ_t grads[:, t] ⊗ inputs[:, t].

    Args:
        factors: (B, T, O) and (B, T, I).
        signs: (O,) and (I,).
    """
    left, right = (torch.fft.rfft(_side(side, sign)) for side, sign in zip(factors, signs, strict=True))
    return torch.fft.irfft((left * right).sum(1), n=SIZE)


def of_either(factors: Factors, product: Tensor, signs: Factors) -> Tensor:
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
