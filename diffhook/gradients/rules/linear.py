"""y = x Wᵀ + b, with any number of axes between sample and feature."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from diffhook.gradients.norms import squared_norms
from diffhook.gradients.rules.registry import LayerRule, Mixers, Outer, Product, Reduced, register
from diffhook.gradients.scratch import scratch
from diffhook.gradients.tuning import tuner


@register(nn.Linear)
class LinearRule(LayerRule):
    joins = True

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
            tokens = _tokens(inputs).to(grad.dtype)
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


def _tokens(values: Tensor) -> Tensor:
    """(B, …, F) → (B, T, F)."""
    return values.reshape(values.shape[0], -1, values.shape[-1])


def _product(tokens: Tensor, grad: Tensor) -> Tensor:
    out = scratch((len(grad), grad.shape[2], tokens.shape[2]), grad)
    return torch.bmm(grad.transpose(1, 2), tokens, out=out)


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
        "product": lambda: squared_norms(_product(tokens, grad).flatten(1)),
    }
    return tuner(grad.device).fastest(key, ways)
