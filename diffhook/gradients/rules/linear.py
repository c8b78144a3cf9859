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
            if "weight" in mixers and _ghost_is_cheaper(tokens, grad):
                yield "weight", Reduced(_ghost_squares(tokens, grad), None)
            else:
                yield "weight", torch.bmm(grad.transpose(1, 2), tokens)
        if "bias" in wanted:
            yield "bias", grad.sum(1)


def _ghost_is_cheaper(tokens: Tensor, grad: Tensor) -> bool:
    """Whether two Gram matrices over T tokens beat the product."""
    count, inward, outward = tokens.shape[1], tokens.shape[2], grad.shape[2]
    return count * (inward + outward) < inward * outward


def _ghost_squares(tokens: Tensor, grad: Tensor) -> Tensor:
    """(B,) float64 ‖GᵀA‖² = ⟨AAᵀ, GGᵀ⟩ without GᵀA."""
    inside = torch.bmm(tokens, tokens.transpose(1, 2))
    between = torch.bmm(grad, grad.transpose(1, 2))
    return (inside * between).flatten(1).sum(1).double()
