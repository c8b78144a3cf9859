"""Convolutions in one, two and three dimensions."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffhook.gradients.lengths import squared_lengths
from diffhook.gradients.rules.geometry import Geometry
from diffhook.gradients.rules.ghost import ghost_is_cheaper, ghost_squares
from diffhook.gradients.rules.registry import LayerRule, Mixers, Reduced, register

_Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d


@register(nn.Conv1d, nn.Conv2d, nn.Conv3d)
class ConvRule(LayerRule):
    def products(
        self,
        module: nn.Module,
        inputs: Tensor,
        grad_output: Tensor,
        wanted: Collection[str],
        mixers: Mapping[str, Mixers | None],
    ) -> Iterator[tuple[str, Tensor | Reduced]]:
        assert isinstance(module, _Conv)
        # Explicit contiguity: with channels_last strides the batch cannot be folded into groups.
        grad = grad_output.contiguous()
        if "weight" in wanted:
            padded, geometry = _padded(module, inputs.to(grad.dtype))
            padded = padded.contiguous()
            if "weight" in mixers:
                yield "weight", _reduced(padded, grad, geometry, mixers["weight"])
            else:
                yield "weight", weight_products(padded, grad, geometry)
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


def _reduced(inputs: Tensor, grad: Tensor, geometry: Geometry, mixers: Mixers | None) -> Reduced:
    """Norms by the cheaper way, and the product of the mixed channels."""
    if ghost_is_cheaper(inputs, grad, geometry):
        squares = ghost_squares(inputs, grad, geometry)
    else:
        squares = squared_lengths(weight_products(inputs, grad, geometry).flatten(1))
    if mixers is None:
        return Reduced(squares, None)
    narrow_inputs = _mix(inputs, mixers.inward)
    narrow_grad = _mix(grad, mixers.outward)
    return Reduced(squares, weight_products(narrow_inputs, narrow_grad, geometry).flatten(1))


def _mix(maps: Tensor, mixer: Tensor) -> Tensor:
    """(B, C, *space) → (B, q, *space)."""
    flat = torch.matmul(mixer.t(), maps.flatten(2))
    return flat.view(len(maps), -1, *maps.shape[2:])


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
