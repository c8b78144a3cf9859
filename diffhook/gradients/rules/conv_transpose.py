"""Transposed convolutions in one, two and three dimensions.

Each is the transpose of a convolution with the same weight. Input and output change places, and the weight's
gradient is the convolution's, made of our output's gradient and our input. What ``output_padding`` or
``output_size`` have added is read off the gradient's shape.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn import functional as F

from diffhook.gradients.rules import conv_weight
from diffhook.gradients.rules.call import Call, Product
from diffhook.gradients.rules.conv_products import Geometry, Maps
from diffhook.gradients.rules.registry import LayerRule, register

_ConvTranspose = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


@register
class ConvTransposeRule(LayerRule[_ConvTranspose]):
    modules = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    parameters = ("weight", "bias")
    methods = ("forward", "_output_padding")
    without_input = ("bias",)

    def samples_first(self, module: _ConvTranspose, inputs: Tensor) -> bool:
        return inputs.dim() == len(module.kernel_size) + 2

    def mixes_channels(self, module: _ConvTranspose) -> bool:
        return module.groups == 1

    def products(self, call: Call[_ConvTranspose]) -> Iterator[tuple[str, Product]]:
        grad = call.grad_output.contiguous()
        if "weight" in call.wanted:
            yield "weight", conv_weight.product(_maps(call.module, call.inputs, grad), call.mixers)
        if "bias" in call.wanted:
            yield "bias", grad.flatten(2).sum(2)

    def workspace(self, call: Call[_ConvTranspose]) -> int:
        size = super().workspace(call)
        few = call.of(conv_weight.sample(size))
        return conv_weight.workspace(_maps(call.module, few.inputs, few.grad_output), call.mixers, size)


def _maps(module: _ConvTranspose, inputs: Tensor, grad: Tensor) -> Maps:
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
