"""Normalisation layers with a learned scale and shift.

The normalised input is computed anew: what autograd saved of it is not reachable for every kernel.
Layers that mix samples (batch normalisation in training mode) have no per-sample gradient and no
rule here.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import TypeVar

from torch import Tensor, nn
from torch.nn import functional as F

from diffhook.gradients.products import added_up, widened
from diffhook.gradients.rules.call import Call, Product
from diffhook.gradients.rules.registry import LayerRule, register


@register
class GroupNormRule(LayerRule[nn.GroupNorm]):
    modules = (nn.GroupNorm,)
    parameters = ("weight", "bias")
    without_input = ("bias",)
    takes_half = True

    def samples_first(self, module: nn.GroupNorm, inputs: Tensor) -> bool:
        return True  # it takes no other input

    def mixes_channels(self, module: nn.GroupNorm) -> bool:
        return False

    def products(self, call: Call[nn.GroupNorm]) -> Iterator[tuple[str, Product]]:
        grad = call.grad_output.reshape(*call.grad_output.shape[:2], -1)
        if "weight" in call.wanted:
            values = widened(call.inputs.to(grad.dtype)).reshape(grad.shape)
            normal = F.group_norm(values, call.module.num_groups, eps=call.module.eps)
            yield "weight", normal.mul_(grad).sum(2)
        if "bias" in call.wanted:
            yield "bias", added_up(grad, 2)


N = TypeVar("N", nn.LayerNorm, nn.RMSNorm)


class _TokenNormRule(LayerRule[N]):
    """Normalisation over the last axes, one scale per element of them."""

    @abstractmethod
    def normalized(self, module: N, inputs: Tensor) -> Tensor: ...

    def samples_first(self, module: N, inputs: Tensor) -> bool:
        return inputs.dim() > len(module.normalized_shape)

    def mixes_channels(self, module: N) -> bool:
        return False

    def products(self, call: Call[N]) -> Iterator[tuple[str, Product]]:
        grad = call.grad_output
        rows = (len(call), -1, *call.module.normalized_shape)
        if "weight" in call.wanted:
            normal = self.normalized(call.module, widened(call.inputs.to(grad.dtype)))
            yield "weight", normal.mul_(grad).reshape(rows).sum(1)
        if "bias" in call.wanted:
            yield "bias", added_up(grad.reshape(rows), 1)


@register
class LayerNormRule(_TokenNormRule[nn.LayerNorm]):
    modules = (nn.LayerNorm,)
    parameters = ("weight", "bias")
    without_input = ("bias",)
    takes_half = True
    rounded = True

    def normalized(self, module: nn.LayerNorm, inputs: Tensor) -> Tensor:
        return F.layer_norm(inputs, module.normalized_shape, eps=module.eps)


@register
class RMSNormRule(_TokenNormRule[nn.RMSNorm]):
    modules = (nn.RMSNorm,)
    parameters = ("weight",)
    takes_half = True

    def normalized(self, module: nn.RMSNorm, inputs: Tensor) -> Tensor:
        return F.rms_norm(inputs, list(module.normalized_shape), eps=module.eps)
