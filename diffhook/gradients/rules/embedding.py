"""Look-up tables."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from diffhook.gradients.products import widened
from diffhook.gradients.rules.call import Call, Factors, Product
from diffhook.gradients.rules.registry import LayerRule, register


@register
class EmbeddingRule(LayerRule[nn.Embedding]):
    modules = (nn.Embedding,)
    parameters = ("weight",)
    gives_factors = True
    takes_half = True

    def samples_first(self, module: nn.Embedding, inputs: Tensor) -> bool:
        return inputs.dim() > 0

    def mixes_channels(self, module: nn.Embedding) -> bool:
        return False

    def products(self, call: Call[nn.Embedding]) -> Iterator[tuple[str, Product]]:
        if "weight" not in call.wanted:
            return
        yield "weight", _factors(call) if _as_factors(call) else _table(call)

    def workspace(self, call: Call[nn.Embedding]) -> int:
        if not _as_factors(call):
            return super().workspace(call)
        return _tokens(call) * (call.module.num_embeddings + call.module.embedding_dim)

    def obstacle(self, module: nn.Embedding) -> str | None:
        if module.scale_grad_by_freq:
            return "scale_grad_by_freq makes one sample's gradient depend on the others"
        return None


def _tokens(call: Call[nn.Embedding]) -> int:
    return call.inputs[0].numel()


def _as_factors(call: Call[nn.Embedding]) -> bool:
    """Whether one-hot rows beside the gradients are smaller than the table, and will do."""
    rows, width = call.module.num_embeddings, call.module.embedding_dim
    return "weight" in call.mixers and _tokens(call) * (rows + width) < rows * width


def _factors(call: Call[nn.Embedding]) -> Factors:
    """The looked-up rows, one-hot, and what came back to each."""
    module, grad = call.module, call.grad_output
    indices = call.inputs.reshape(len(call), -1, 1)
    hot = indices == torch.arange(module.num_embeddings, device=indices.device)
    if module.padding_idx is not None:
        hot &= indices != module.padding_idx
    return Factors(hot.to(grad.dtype), grad.reshape(len(call), -1, module.embedding_dim))


def _table(call: Call[nn.Embedding]) -> Tensor:
    """(B, rows, width)"""
    module, batch, grad = call.module, len(call), widened(call.grad_output)
    indices = call.inputs.reshape(batch, -1, 1).expand(-1, -1, module.embedding_dim)
    table = grad.new_zeros(batch, module.num_embeddings, module.embedding_dim)
    table.scatter_add_(1, indices, grad.reshape(batch, -1, module.embedding_dim))
    if module.padding_idx is not None:
        table[:, module.padding_idx] = 0
    return table
