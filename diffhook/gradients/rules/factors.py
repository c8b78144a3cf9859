"""What is had of a matrix's gradient by its factors: sums, norms, and the gradient itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from diffhook.gradients import products
from diffhook.gradients.norms import piece_norms
from diffhook.gradients.rules.call import Factors
from diffhook.gradients.tuning import tuner


def formed(factors: Factors) -> Tensor:
    """(B, O, I)"""
    grads, inputs = factors
    return products.bmm(grads.transpose(1, 2), inputs, in_scratch=True)


def summed(factors: Factors) -> Tensor:
    """(O, I), the gradient of the whole batch."""
    grads, inputs = (side.flatten(0, 1) for side in factors)
    return products.mm(grads.t(), inputs)


def gram_squares(factors: Factors) -> Tensor:
    """(B, 1) ‖GᵀA‖² = ⟨AAᵀ, GGᵀ⟩ without GᵀA."""
    between, inside = (products.bmm(side, side.transpose(1, 2)).flatten(1) for side in factors)
    if inside.shape[1] == 1:
        return inside * between
    return torch.linalg.vecdot(inside, between).unsqueeze(1)


def forms(factors: Factors) -> bool:
    """Whether norms are had sooner, or in less memory, from the product than from Gram matrices over T."""
    grads, inputs = factors
    (_, count, outward), inward = grads.shape, inputs.shape[2]
    if count == 1 or count * (inward + outward) > inward * outward:
        return count > 1
    key = f"linear {count} {inward} {outward} {grads.dtype}"
    ways: dict[str, Callable[[], object]] = {
        "ghost": partial(gram_squares, factors),
        "product": lambda: piece_norms(formed(factors).flatten(1)),
    }
    return tuner(grads.device).fastest(key, ways) == "product"
