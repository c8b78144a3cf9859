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
from torch.nn import functional as F

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
    pixels, between = _gram(inputs), _gram(grad)
    # A CPU's cache wants one tap after the other; a GPU pays for every kernel.
    summed = tap_by_tap if inputs.device.type == "cpu" else all_taps
    windows = summed(pixels, between.shape, geometry)
    return torch.linalg.vecdot(windows.flatten(1), between.flatten(1)).unsqueeze(1)


def tap_by_tap(pixels: Tensor, shape: torch.Size, geometry: Geometry) -> Tensor:
    """Inner products of windows, from those of pixels.

    Args:
        pixels: (B, *space, *space).
        shape: (B, *space', *space'), of the result.
    """
    windows = pixels.new_zeros(shape)
    axes = len(geometry.kernel)
    for tap in itertools.product(*map(range, geometry.kernel)):
        ours, theirs = _overlap(tap, geometry.padding, pixels.shape[1 : 1 + axes], shape[1 : 1 + axes])
        windows[(slice(None), *theirs, *theirs)].add_(pixels[(slice(None), *ours, *ours)])
    return windows


def all_taps(pixels: Tensor, shape: torch.Size, geometry: Geometry) -> Tensor:
    """:func:`tap_by_tap` in two kernels: on a padded map, a tap is a step along both pixels' axes."""
    around = [amount for pad in reversed(geometry.padding) for amount in (pad, pad)]
    padded = F.pad(pixels, around * 2) if any(around) else pixels
    axes = len(geometry.kernel)
    batch, *steps = padded.stride()
    taps = [one + other for one, other in zip(steps[:axes], steps[axes:], strict=True)]
    view = padded.as_strided((shape[0], *geometry.kernel, *shape[1:]), (batch, *taps, *steps))
    return view.sum(tuple(range(1, 1 + axes)))


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
