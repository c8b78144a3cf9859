"""y = x Wᵀ + b, with any number of axes between sample and feature."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from diffhook.gradients.lengths import squared_lengths
from diffhook.gradients.rules.registry import LayerRule, Mixers, Outer, Product, Reduced, register
from diffhook.gradients.tuning import tuner


@register(nn.Linear)
class LinearRule(LayerRule):
    def products(
        self,
        module: nn.Module,
        inputs: Tensor,
        grad_output: Tensor,
        wanted: Collection[str],
        mixers: Mapping[str, Mixers | None],
    ) -> Iterator[tuple[str, Product]]:
        batch = inputs.shape[0]
        grad = grad_output.reshape(batch, -1, grad_output.shape[-1])
        if "weight" in wanted:
            tokens = inputs.reshape(batch, -1, inputs.shape[-1]).to(grad.dtype)
            if grad.shape[1] == 1:
                yield "weight", Outer(grad[:, 0], tokens[:, 0])
            elif "weight" in mixers and _norm_way(tokens, grad) == "ghost":
                yield "weight", Reduced(_ghost_squares(tokens, grad), None)
            else:
                yield "weight", _product(tokens, grad)
        if "bias" in wanted:
            yield "bias", grad.sum(1)

    def workspace(
        self, module: nn.Module, inputs: Tensor, grad_output: Tensor, mixers: Mapping[str, Mixers | None]
    ) -> int:
        if inputs.dim() == 2:
            return inputs[0].numel() + grad_output[0].numel()
        return super().workspace(module, inputs, grad_output, mixers)


def _product(tokens: Tensor, grad: Tensor) -> Tensor:
    return torch.bmm(grad.transpose(1, 2), tokens)


def _ghost_squares(tokens: Tensor, grad: Tensor) -> Tensor:
    """(B,) float64 ‖GᵀA‖² = ⟨AAᵀ, GGᵀ⟩ without GᵀA."""
    inside = torch.bmm(tokens, tokens.transpose(1, 2))
    between = torch.bmm(grad, grad.transpose(1, 2))
    return torch.linalg.vecdot(inside.flatten(1), between.flatten(1)).double()


def _norm_way(tokens: Tensor, grad: Tensor) -> str:
    """Gram matrices over tokens or the product, where only norms are asked for."""
    (_, count, inward), outward = tokens.shape, grad.shape[2]
    if count * (inward + outward) > inward * outward:
        return "product"  # also in memory, Gram matrices would be the larger
    key = f"linear {count} {inward} {outward} {grad.dtype}"
    ways: dict[str, Callable[[], object]] = {
        "ghost": partial(_ghost_squares, tokens, grad),
        "product": lambda: squared_lengths(_product(tokens, grad).flatten(1)),
    }
    return tuner(grad.device).fastest(key, ways)
