"""Transposed convolutions in one, two and three dimensions.

Each is the transpose of a convolution with the same weight. Input and output change places, and the weight's
gradient is the convolution's, made of our output's gradient and our input. What ``output_padding`` or
``output_size`` have added is read off the gradient's shape.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from diffhook.gradients.rules.conv_products import Geometry, Maps
from diffhook.gradients.rules.convolution import ConvolutionRule, ConvTranspose
from diffhook.gradients.rules.registry import register


@register
class ConvTransposeRule(ConvolutionRule[ConvTranspose]):
    modules = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    methods = ("forward", "_output_padding")

    def maps(self, module: ConvTranspose, inputs: Tensor, grad: Tensor) -> Maps:
        """Of the convolution that this one transposes, from our output to our input."""
        assert not isinstance(module.padding, str)  # torch refuses it here
        padding = module.padding
        spans = zip(inputs.shape[2:], module.kernel_size, module.stride, module.dilation, strict=True)
        needed = [(size - 1) * stride + (taps - 1) * gap + 1 for size, taps, stride, gap in spans]
        sizes = zip(grad.shape[2:], padding, needed, strict=True)
        spare = [size + 2 * pad - need for size, pad, need in sizes]
        if any(more >= stride for more, stride in zip(spare, module.stride, strict=True)):
            # Only an output_padding of a stride or more, beside a dilation: the convolution would answer with
            # more pixels than there are inputs.
            edges = [(pad, pad - more) for pad, more in zip(padding, spare, strict=True)]
            grad = F.pad(grad, [edge for pair in reversed(edges) for edge in pair])
            padding = (0,) * len(edges)
        geometry = Geometry(module.kernel_size, module.stride, padding, module.dilation, module.groups)
        return Maps(grad.contiguous(), inputs.to(grad.dtype).contiguous(), geometry)
