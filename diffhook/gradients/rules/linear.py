"""y = x Wᵀ + b, with any number of axes between sample and feature."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor, nn

from diffhook.gradients.rules.registry import LayerRule, Mixers, Reduced, register


@register(nn.Linear)
class LinearRule(LayerRule):
    def products(
        self,
        module: nn.Module,
        inputs: Tensor,
        grad_output: Tensor,
        wanted: Collection[str],
        mixers: Mapping[str, Mixers | None],
    ) -> Iterator[tuple[str, Tensor | Reduced]]:
        batch = inputs.shape[0]
        grad = grad_output.reshape(batch, -1, grad_output.shape[-1])
        if "weight" in wanted:
            tokens = inputs.reshape(batch, -1, inputs.shape[-1]).to(grad.dtype)
            yield "weight", torch.bmm(grad.transpose(1, 2), tokens)
        if "bias" in wanted:
            yield "bias", grad.sum(1)
