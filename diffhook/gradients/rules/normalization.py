"""Normalisation layers with a learned scale and shift.

The normalised input is computed anew: what autograd saved of it is not reachable for every kernel.
Layers that mix samples (batch normalisation in training mode) have no per-sample gradient and no
rule here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffhook.gradients.rules.registry import LayerRule, Mixers, Product, register


@register(nn.GroupNorm)
class GroupNormRule(LayerRule):
    def products(
        self,
        module: nn.Module,
        inputs: Tensor,
        grad_output: Tensor,
        wanted: Collection[str],
        mixers: Mapping[str, Mixers | None],
    ) -> Iterator[tuple[str, Product]]:
        assert isinstance(module, nn.GroupNorm)
        batch, channels = grad_output.shape[:2]
        grad = grad_output.reshape(batch, channels, -1)
        if "weight" in wanted:
            values = inputs.to(grad.dtype).reshape(grad.shape)
            normal = F.group_norm(values, module.num_groups, eps=module.eps)
            yield "weight", torch.linalg.vecdot(grad, normal)
        if "bias" in wanted:
            yield "bias", grad.sum(2)


class _TokenNormRule(LayerRule):
    """Normalisation over the last axes, one scale per element of them."""

    def normalized(self, module: nn.Module, inputs: Tensor) -> Tensor:
        raise NotImplementedError

    def products(
        self,
        module: nn.Module,
        inputs: Tensor,
        grad_output: Tensor,
        wanted: Collection[str],
        mixers: Mapping[str, Mixers | None],
    ) -> Iterator[tuple[str, Product]]:
        assert isinstance(module, nn.LayerNorm | nn.RMSNorm)
        shape = tuple(module.normalized_shape)
        rows = (grad_output.shape[0], -1, *shape)
        if "weight" in wanted:
            normal = self.normalized(module, inputs.to(grad_output.dtype))
            yield "weight", (grad_output * normal).reshape(rows).sum(1)
        if "bias" in wanted:
            yield "bias", grad_output.reshape(rows).sum(1)


@register(nn.LayerNorm)
class LayerNormRule(_TokenNormRule):
    rounded = True

    def normalized(self, module: nn.Module, inputs: Tensor) -> Tensor:
        assert isinstance(module, nn.LayerNorm)
        return F.layer_norm(inputs, module.normalized_shape, eps=module.eps)


@register(nn.RMSNorm)
class RMSNormRule(_TokenNormRule):
    def normalized(self, module: nn.Module, inputs: Tensor) -> Tensor:
        assert isinstance(module, nn.RMSNorm)
        return F.rms_norm(inputs, list(module.normalized_shape), eps=module.eps)
