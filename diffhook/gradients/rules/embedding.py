"""Look-up tables."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from diffhook.gradients.rules.call import Call, Product
from diffhook.gradients.rules.registry import LayerRule, register


@register
class EmbeddingRule(LayerRule[nn.Embedding]):
    modules = (nn.Embedding,)
    parameters = ("weight",)

    def samples_first(self, module: nn.Embedding, inputs: Tensor) -> bool:
        return inputs.dim() > 0

    def mixes_channels(self, module: nn.Embedding) -> bool:
        return False

    def products(self, call: Call[nn.Embedding]) -> Iterator[tuple[str, Product]]:
        if "weight" not in call.wanted:
            return
        module, batch = call.module, len(call)
        rows, width = module.num_embeddings, module.embedding_dim
        indices = call.inputs.reshape(batch, -1, 1).expand(-1, -1, width)
        table = call.grad_output.new_zeros(batch, rows, width)
        table.scatter_add_(1, indices, call.grad_output.reshape(batch, -1, width))
        if module.padding_idx is not None:
            table[:, module.padding_idx] = 0
        yield "weight", table

    def obstacle(self, module: nn.Embedding) -> str | None:
        if module.scale_grad_by_freq:
            return "scale_grad_by_freq makes one sample's gradient depend on the others"
        return None
