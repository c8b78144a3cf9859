"""Norms of convolution-weight gradients that are never formed.

‖Σ_p g_p ⊗ window_p‖² = Σ_{p,q} ⟨g_p, g_q⟩ ⟨window_p, window_q⟩, and the inner product of two windows
is a sum over the kernel's positions δ of ⟨a_{p+δ}, a_{q+δ}⟩: one Gram matrix of the input's pixels
and one of the gradient's give everything, at T² (I + O) instead of T · I · O · kernel operations.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from diffhook.gradients.rules.geometry import Geometry

# Cost of the shifted sums, per pair of pixels, in units of one channel's multiply-add; measured.
_SHIFTS = 190
_SLOWER = 1.35  # Gram matrices run at a lower rate than convolutions


def ghost_is_cheaper(inputs: Tensor, grad: Tensor, geometry: Geometry) -> bool:
    """Whether Gram matrices beat the product, by operations counted and weighed.

    Only for plain convolutions: stride and dilation 1, one group.
    """
    if set(geometry.stride) | set(geometry.dilation) != {1} or geometry.groups != 1:
        return False
    pixels = math.prod(grad.shape[2:])
    channels_in, channels_out = inputs.shape[1], grad.shape[1]
    taps = math.prod(geometry.kernel)
    gram = _SLOWER * pixels * (channels_in + channels_out + _SHIFTS)
    return gram < taps * channels_in * channels_out


def ghost_squares(inputs: Tensor, grad: Tensor, geometry: Geometry) -> Tensor:
    """(B,) float64 squared norms of the per-sample weight gradients.

    Args:
        inputs: (B, I, *space).
        grad: (B, O, *space').
    """
    between = _gram(grad)
    inside = _gram(inputs)
    total = torch.zeros(len(grad), dtype=torch.float64, device=grad.device)
    for tap in itertools.product(*map(range, geometry.kernel)):
        ours, theirs = _overlap(tap, geometry.padding, inputs.shape[2:], grad.shape[2:])
        part = inside[(slice(None), *ours, *ours)] * between[(slice(None), *theirs, *theirs)]
        total += part.flatten(1).sum(1)
    return total


def _gram(maps: Tensor) -> Tensor:
    """(B, C, *space) → (B, *space, *space), inner products over channels."""
    flat = maps.flatten(2)
    space = maps.shape[2:]
    return torch.bmm(flat.transpose(1, 2), flat).view(len(maps), *space, *space)


def _overlap(
    tap: tuple[int, ...], padding: tuple[int, ...], size_in: torch.Size, size_out: torch.Size
) -> tuple[list[slice], list[slice]]:
    """Input pixels under one kernel position, and the output pixels that see them there."""
    ours, theirs = [], []
    for offset, pad, inward, outward in zip(tap, padding, size_in, size_out, strict=True):
        shift = offset - pad  # output pixel p sees input pixel p + shift
        first, last = max(0, -shift), min(outward, inward - shift)
        theirs.append(slice(first, max(last, first)))
        ours.append(slice(first + shift, max(last, first) + shift))
    return ours, theirs
