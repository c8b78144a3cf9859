"""Convolutions in one, two and three dimensions."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn import functional as F

from diffhook.gradients.rules import conv_weight
from diffhook.gradients.rules.call import Call, Product
from diffhook.gradients.rules.conv_products import Geometry, Maps
from diffhook.gradients.rules.registry import LayerRule, register

_Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d


@register
class ConvRule(LayerRule[_Conv]):
    modules = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    parameters = ("weight", "bias")
    methods = ("forward", "_conv_forward")
    without_input = ("bias",)

    def samples_first(self, module: _Conv, inputs: Tensor) -> bool:
        return inputs.dim() == len(module.kernel_size) + 2

    def mixes_channels(self, module: _Conv) -> bool:
        return module.groups == 1

    def products(self, call: Call[_Conv]) -> Iterator[tuple[str, Product]]:
        # Contiguous before all: with channels_last strides the batch cannot be folded into groups.
        grad = call.grad_output.contiguous()
        if "weight" in call.wanted:
            yield "weight", conv_weight.product(_maps(call.module, call.inputs, grad), call.mixers)
        if "bias" in call.wanted:
            yield "bias", grad.flatten(2).sum(2)

    def workspace(self, call: Call[_Conv]) -> int:
        size = super().workspace(call)
        few = call.of(conv_weight.sample(size))
        return conv_weight.workspace(_maps(call.module, few.inputs, few.grad_output), call.mixers, size)


def _maps(module: _Conv, inputs: Tensor, grad: Tensor) -> Maps:
    """With every kind of padding reduced to symmetric zeros."""
    inputs = inputs.to(grad.dtype)
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
    return Maps(inputs.contiguous(), grad.contiguous(), geometry)
