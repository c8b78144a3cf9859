"""What convolutions and transposed ones share: the weight's gradient correlates two maps."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import TypeVar

from torch import Tensor, nn

from diffhook.gradients.products import added_up
from diffhook.gradients.rules import conv_weight
from diffhook.gradients.rules.call import Call, Product
from diffhook.gradients.rules.conv_products import Maps
from diffhook.gradients.rules.registry import LayerRule
from diffhook.gradients.tuning import timed_rows

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
ConvTranspose = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
C = TypeVar("C", bound=Conv | ConvTranspose)


class ConvolutionRule(LayerRule[C]):
    """A rule says which two maps, see :meth:`maps`."""

    parameters = ("weight", "bias")
    without_input = ("bias",)
    takes_half = True

    @abstractmethod
    def maps(self, module: C, inputs: Tensor, grad: Tensor) -> Maps:
        """The convolution whose weight gradient is the layer's.

        Args:
            inputs: (B, …) of the layer.
            grad: (B, …) of its output.
        """

    def samples_first(self, module: C, inputs: Tensor) -> bool:
        return inputs.dim() == len(module.kernel_size) + 2

    def mixes_channels(self, module: C) -> bool:
        return module.groups == 1

    def products(self, call: Call[C]) -> Iterator[tuple[str, Product]]:
        # Contiguous before all: with channels_last strides the batch cannot be folded into groups.
        grad = call.grad_output.contiguous()
        if "weight" in call.wanted:
            yield "weight", conv_weight.product(self.maps(call.module, call.inputs, grad), call.mixers)
        if "bias" in call.wanted:
            yield "bias", added_up(grad.flatten(2), 2)

    def workspace(self, call: Call[C]) -> int:
        size = super().workspace(call)
        few = call.of(timed_rows(size, call.grad_output.device))
        return conv_weight.workspace(self.maps(call.module, few.inputs, few.grad_output), call.mixers, size)
