"""Look-up tables."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from torch import Tensor, nn

from diffhook.gradients.rules.registry import LayerRule, Mixers, Product, register


@register(nn.Embedding)
class EmbeddingRule(LayerRule):
    def products(
        self,
        module: nn.Module,
        inputs: Tensor,
        grad_output: Tensor,
        wanted: Collection[str],
        mixers: Mapping[str, Mixers | None],
    ) -> Iterator[tuple[str, Product]]:
        assert isinstance(module, nn.Embedding)
        if "weight" not in wanted:
            return
        batch, rows, width = inputs.shape[0], module.num_embeddings, module.embedding_dim
        indices = inputs.reshape(batch, -1, 1).expand(-1, -1, width)
        table = grad_output.new_zeros(batch, rows, width)
        table.scatter_add_(1, indices, grad_output.reshape(batch, -1, width))
        if module.padding_idx is not None:
            table[:, module.padding_idx] = 0
        yield "weight", table

    def obstacle(self, module: nn.Module) -> str | None:
        assert isinstance(module, nn.Embedding)
        if module.scale_grad_by_freq:
            return "scale_grad_by_freq makes one sample's gradient depend on the others"
        return None
