"""Convolutions in one, two and three dimensions."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from diffhook.compat.torch import padding_amounts
from diffhook.gradients.rules.conv_products import Geometry, Maps
from diffhook.gradients.rules.convolution import Conv, ConvolutionRule
from diffhook.gradients.rules.registry import register


@register
class ConvRule(ConvolutionRule[Conv]):
    modules = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    methods = ("forward", "_conv_forward")

    def maps(self, module: Conv, inputs: Tensor, grad: Tensor) -> Maps:
        """The layer's own, with every kind of padding reduced to symmetric zeros."""
        inputs = inputs.to(grad.dtype)
        padding = module.padding
        if module.padding_mode != "zeros" or padding == "same":
            amounts = padding_amounts(module)
            mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
            inputs = F.pad(inputs, amounts, mode=mode)
            padding = (0,) * len(module.kernel_size)
        elif padding == "valid":
            padding = (0,) * len(module.kernel_size)
        assert not isinstance(padding, str)
        geometry = Geometry(module.kernel_size, module.stride, padding, module.dilation, module.groups)
        return Maps(inputs.contiguous(), grad.contiguous(), geometry)
