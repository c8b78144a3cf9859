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

from diffhook.gradients import products
from diffhook.gradients.rules.conv_products import Geometry


def ghost_applies(inputs: Tensor, grad: Tensor, geometry: Geometry) -> bool:
    """Only to plain convolutions (stride and dilation 1, one group), and not where Gram matrices
    would take more operations, and memory, than the product."""
    if set(geometry.stride) | set(geometry.dilation) != {1} or geometry.groups != 1:
        return False
    pixels, taps = math.prod(grad.shape[2:]), math.prod(geometry.kernel)
    channels_in, channels_out = inputs.shape[1], grad.shape[1]
    return pixels * (channels_in + channels_out) <= taps * channels_in * channels_out


def ghost_size(inputs: Tensor, grad: Tensor) -> int:
    """Numbers alive per sample, besides inputs and gradients."""
    return math.prod(inputs.shape[2:]) ** 2 + 2 * math.prod(grad.shape[2:]) ** 2


def ghost_squares(inputs: Tensor, grad: Tensor, geometry: Geometry) -> Tensor:
    """(B, 1) squared norms of the per-sample weight gradients.

    Args:
        inputs: (B, I, *space).
        grad: (B, O, *space').
    """
    pixels = _gram(inputs)
    between = _gram(grad)
    windows = torch.zeros_like(between)
    for tap in itertools.product(*map(range, geometry.kernel)):
        ours, theirs = _overlap(tap, geometry.padding, inputs.shape[2:], grad.shape[2:])
        windows[(slice(None), *theirs, *theirs)].add_(pixels[(slice(None), *ours, *ours)])
    return torch.linalg.vecdot(windows.flatten(1), between.flatten(1)).unsqueeze(1)


def _gram(maps: Tensor) -> Tensor:
    """(B, C, *space) → (B, *space, *space), inner products over channels."""
    flat = maps.flatten(2)
    space = maps.shape[2:]
    return products.bmm(flat.transpose(1, 2), flat).view(len(maps), *space, *space)


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
