"""Ways to the weight gradient of each sample under a convolution.

All give the same numbers; which is fastest depends on shapes and machine. Each takes what is in
:class:`Maps` and returns (B, O, I/groups, *kernel); of maps in half precision perhaps rounded to it, as
autograd's own weight gradients are.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from diffhook.gradients import products
from diffhook.gradients.scratch import scratch


@dataclass(frozen=True)
class Geometry:
    """What a weight gradient needs to know of a convolution besides its tensors."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


class Maps(NamedTuple):
    """Two maps whose correlation is the weight gradient of a convolution."""

    inputs: Tensor  # (B, I, *space), contiguous
    grad: Tensor  # (B, O, *space'), contiguous: of the output
    geometry: Geometry


class Way(ABC):
    """One algorithm."""

    @abstractmethod
    def __call__(self, inputs: Tensor, grad: Tensor, geometry: Geometry) -> Tensor: ...

    def size(self, inputs: Tensor, grad: Tensor, geometry: Geometry) -> int:
        """Numbers alive per sample, besides inputs and gradients: here, the result."""
        return grad.shape[1] * (inputs.shape[1] // geometry.groups) * math.prod(geometry.kernel)


class Grouped(Way):
    """One convolution-weight gradient with the batch folded into B·groups groups."""

    def __call__(self, inputs: Tensor, grad: Tensor, geometry: Geometry) -> Tensor:
        batch = len(inputs)
        product = _weight_gradient(
            inputs.reshape(1, -1, *inputs.shape[2:]), grad.reshape(1, -1, *grad.shape[2:]), geometry, batch
        )
        return product.view(batch, grad.shape[1], *product.shape[1:])


class Looped(Way):
    """One ordinary weight gradient per sample: for weights so wide that each keeps the machine busy."""

    def __call__(self, inputs: Tensor, grad: Tensor, geometry: Geometry) -> Tensor:
        rows = zip(inputs.split(1), grad.split(1), strict=True)
        out = scratch(
            (len(inputs), grad.shape[1], inputs.shape[1] // geometry.groups, *geometry.kernel), grad
        )
        return torch.stack([_weight_gradient(ours, theirs, geometry, 1) for ours, theirs in rows], out=out)


class Columns(Way):
    """Windows side by side, then one batched matrix product; 1×1 kernels need no windows."""

    def __call__(self, inputs: Tensor, grad: Tensor, geometry: Geometry) -> Tensor:
        batch, groups = len(inputs), geometry.groups
        pixels = math.prod(grad.shape[2:])
        columns = _windows(inputs, grad.shape[2:], geometry).reshape(batch * groups, -1, pixels)
        flat = grad.reshape(batch * groups, -1, pixels)
        product = products.bmm(flat, columns.transpose(1, 2), in_scratch=True)
        return product.view(batch, grad.shape[1], inputs.shape[1] // groups, *geometry.kernel)

    def size(self, inputs: Tensor, grad: Tensor, geometry: Geometry) -> int:
        columns = inputs.shape[1] * math.prod(geometry.kernel) * math.prod(grad.shape[2:])
        return max(columns, super().size(inputs, grad, geometry))


WAYS: dict[str, Way] = {"grouped": Grouped(), "looped": Looped(), "columns": Columns()}


def _weight_gradient(inputs: Tensor, grad: Tensor, geometry: Geometry, batch: int) -> Tensor:
    """The summed weight gradient of a convolution with ``batch`` times as many groups."""
    groups = batch * geometry.groups
    # Only its shape is read.
    weight = grad.new_empty(()).expand(grad.shape[1], inputs.shape[1] // groups, *geometry.kernel)
    flat = (0,) * len(geometry.kernel)
    product: Tensor = torch.ops.aten.convolution_backward(
        grad,
        inputs,
        weight,
        None,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        False,
        flat,
        groups,
        (False, True, False),
    )[1]
    return product


def _windows(inputs: Tensor, space: torch.Size, geometry: Geometry) -> Tensor:
    """(B, I, *kernel, *space) view of the (padded) inputs under every output pixel."""
    if any(geometry.padding):
        inputs = F.pad(inputs, [amount for pad in reversed(geometry.padding) for amount in (pad, pad)])
    batch, channels, *steps = inputs.stride()
    taps = [step * gap for step, gap in zip(steps, geometry.dilation, strict=True)]
    pixels = [step * stride for step, stride in zip(steps, geometry.stride, strict=True)]
    shape = (*inputs.shape[:2], *geometry.kernel, *space)
    return inputs.as_strided(shape, (batch, channels, *taps, *pixels))
