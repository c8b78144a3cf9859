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
        shift = grad.sum(2)
        if "weight" in wanted:
            # As in torch's own kernel: Σ g·(x − mean)/std without the normalised input in between.
            values = inputs.to(grad.dtype).reshape(grad.shape).contiguous()
            size, groups = values.shape[2], module.num_groups
            _, mean, rstd = torch.native_group_norm(
                values, None, None, batch, channels, size, groups, module.eps
            )
            mean = mean.repeat_interleave(channels // groups, 1)
            rstd = rstd.repeat_interleave(channels // groups, 1)
            yield "weight", (torch.linalg.vecdot(grad, values) - shift * mean) * rstd
        if "bias" in wanted:
            yield "bias", shift


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
    def normalized(self, module: nn.Module, inputs: Tensor) -> Tensor:
        assert isinstance(module, nn.LayerNorm)
        return F.layer_norm(inputs, module.normalized_shape, eps=module.eps)


@register(nn.RMSNorm)
class RMSNormRule(_TokenNormRule):
    def normalized(self, module: nn.Module, inputs: Tensor) -> Tensor:
        assert isinstance(module, nn.RMSNorm)
        return F.rms_norm(inputs, list(module.normalized_shape), eps=module.eps)
