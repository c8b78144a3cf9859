"""Normalisation layers with a learned scale and shift.

The normalised input is computed anew: what autograd saved of it is not reachable for every kernel.
Layers that mix samples (batch normalisation in training mode) have no per-sample gradient and no
rule here.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffhook.gradients.products import added_up, is_half, widened
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
        if "weight" not in call.wanted:
            yield "bias", added_up(grad, 2)
            return
        values = widened(call.inputs.to(grad.dtype)).reshape(grad.shape)
        normal = F.group_norm(values, call.module.num_groups, eps=call.module.eps)
        if is_half(grad):
            yield "weight", normal.mul_(grad).sum(2)
            if "bias" in call.wanted:
                yield "bias", added_up(grad, 2)
            return
        weight, bias = _both_sums(normal, grad)
        yield "weight", weight
        if "bias" in call.wanted:
            yield "bias", bias


def _both_sums(normal: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """(B, C) sums over T of normal · grad, and of grad, which are (B, C, T): each read once.

    They are what torch's own backward adds up for scale and shift; all channels of all samples pass for those
    of one, with a mean of 0 and a deviation of 1 to be taken out.
    """
    batch, channels, tokens = grad.shape
    count = batch * channels
    zero, one = _constants(count, grad.dtype, grad.device)
    _, weight, bias = torch.ops.aten.native_group_norm_backward(
        *(values.reshape(1, count, tokens).contiguous() for values in (grad, normal)),  # it ignores strides
        zero, one, one[0],
        1, count, tokens, count, (False, True, True),
    )  # fmt: skip
    return weight.view(batch, channels), bias.view(batch, channels)


@lru_cache(maxsize=64)
def _constants(count: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """(1, count) zeros and ones."""
    zero = torch.zeros(1, count, dtype=dtype, device=device)
    return zero, torch.ones_like(zero)


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
