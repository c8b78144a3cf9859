"""Convolutions in one, two and three dimensions."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffhook.gradients.rules.registry import LayerRule, register

_Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d


@dataclass(frozen=True)
class Geometry:
    """What a weight gradient needs to know of a convolution besides its tensors."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


@register(nn.Conv1d, nn.Conv2d, nn.Conv3d)
class ConvRule(LayerRule):
    def products(
        self, module: nn.Module, inputs: Tensor, grad_output: Tensor, wanted: Collection[str]
    ) -> Iterator[tuple[str, Tensor]]:
        assert isinstance(module, _Conv)
        # Explicit contiguity: with channels_last strides the batch cannot be folded into groups.
        grad = grad_output.contiguous()
        if "weight" in wanted:
            padded, geometry = _padded(module, inputs.to(grad.dtype))
            yield "weight", weight_products(padded.contiguous(), grad, geometry)
        if "bias" in wanted:
            yield "bias", grad.flatten(2).sum(2)


def _padded(module: _Conv, inputs: Tensor) -> tuple[Tensor, Geometry]:
    """Inputs and geometry with every kind of padding reduced to symmetric zeros."""
    padding = module.padding
    if module.padding_mode != "zeros" or padding == "same":
        amounts = module._reversed_padding_repeated_twice
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        inputs = F.pad(inputs, amounts, mode=mode)
        padding = (0,) * len(module.kernel_size)
    elif padding == "valid":
        padding = (0,) * len(module.kernel_size)
    assert not isinstance(padding, str)
    geometry = Geometry(module.kernel_size, module.stride, padding, module.dilation, module.groups)
    return inputs, geometry


def weight_products(inputs: Tensor, grad: Tensor, geometry: Geometry) -> Tensor:
    """Per-sample weight gradients by ONE convolution-weight gradient with B·groups groups.

    Args:
        inputs: (B, I, *space), contiguous.
        grad: (B, O, *space'), contiguous.

    Returns:
        (B, O, I/groups, *kernel)
    """
    batch, channels_in = inputs.shape[:2]
    channels_out = grad.shape[1]
    shape = (batch * channels_out, channels_in // geometry.groups, *geometry.kernel)
    weight = grad.new_empty(()).expand(shape)  # only its shape is read
    _, product, _ = torch.ops.aten.convolution_backward(
        grad.reshape(1, batch * channels_out, *grad.shape[2:]),
        inputs.reshape(1, batch * channels_in, *inputs.shape[2:]),
        weight,
        None,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        False,
        (0,) * len(geometry.kernel),
        batch * geometry.groups,
        (False, True, False),
    )
    return product.reshape(batch, channels_out, *shape[1:])
