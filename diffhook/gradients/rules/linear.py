"""y = x Wᵀ + b, with any number of axes between sample and feature."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from diffhook.gradients.rules.factors import forms
from diffhook.gradients.rules.registry import Factors, LayerRule, Mixers, Product, register


@register(nn.Linear)
class LinearRule(LayerRule):
    joins = True
    gives_factors = True

    def join(self, calls: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        inputs, grads = zip(*calls, strict=True)
        return torch.cat([_tokens(i) for i in inputs], 1), torch.cat([_tokens(g) for g in grads], 1)

    def products(
        self,
        module: nn.Module,
        inputs: Tensor,
        grad_output: Tensor,
        wanted: Collection[str],
        mixers: Mapping[str, Mixers | None],
    ) -> Iterator[tuple[str, Product]]:
        grad = _tokens(grad_output)
        if "weight" in wanted:
            yield "weight", Factors(grad, _tokens(inputs).to(grad.dtype))
        if "bias" in wanted:
            yield "bias", grad.sum(1)

    def workspace(
        self, module: nn.Module, inputs: Tensor, grad_output: Tensor, mixers: Mapping[str, Mixers | None]
    ) -> int:
        grads, tokens = _tokens(grad_output[:1]), _tokens(inputs[:1]).to(grad_output.dtype)
        if "weight" not in mixers or forms(Factors(grads, tokens)):
            return super().workspace(module, inputs, grad_output, mixers)
        return max(inputs[0].numel(), grad_output[0].numel(), 2 * grads.shape[1] ** 2)


def _tokens(values: Tensor) -> Tensor:
    """(B, …, F) → (B, T, F)."""
    return values.reshape(values.shape[0], -1, values.shape[-1])
