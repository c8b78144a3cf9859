"""y = x Wᵀ + b, with any number of axes between sample and feature."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from diffhook.gradients.products import added_up
from diffhook.gradients.rules.call import Call, Factors, Product
from diffhook.gradients.rules.factors import forms
from diffhook.gradients.rules.registry import LayerRule, register
from diffhook.gradients.tuning import timed_rows


@register
class LinearRule(LayerRule[nn.Linear]):
    modules = (nn.Linear,)
    parameters = ("weight", "bias")
    without_input = ("bias",)
    gives_factors = True
    takes_half = True

    def samples_first(self, module: nn.Linear, inputs: Tensor) -> bool:
        return inputs.dim() > 1

    def mixes_channels(self, module: nn.Linear) -> bool:
        return False  # a matrix is sketched through its factors

    def join(self, calls: Sequence[Call[nn.Linear]]) -> Call[nn.Linear]:
        inputs = torch.cat([_tokens(call.inputs) for call in calls], 1)
        grads = torch.cat([_tokens(call.grad_output) for call in calls], 1)
        return replace(calls[0], inputs=inputs, grad_output=grads)

    def products(self, call: Call[nn.Linear]) -> Iterator[tuple[str, Product]]:
        grad = _tokens(call.grad_output)
        if "weight" in call.wanted:
            yield "weight", Factors(grad, _tokens(call.inputs).to(grad.dtype))
        if "bias" in call.wanted:
            yield "bias", added_up(grad, 1)

    def workspace(self, call: Call[nn.Linear]) -> int:
        size = super().workspace(call)
        few = call.of(timed_rows(size, call.grad_output.device))
        grads, tokens = _tokens(few.grad_output), _tokens(few.inputs).to(few.grad_output.dtype)
        if "weight" not in call.mixers or forms(Factors(grads, tokens)):
            return size
        return max(tokens[0].numel(), grads[0].numel(), 2 * grads.shape[1] ** 2)


def _tokens(values: Tensor) -> Tensor:
    """(B, …, F) → (B, T, F)."""
    return values.reshape(values.shape[0], -1, values.shape[-1])
