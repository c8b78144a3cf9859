"""Models whose parameters have no layer rule: bare, shared, functional, folded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BATCH, TOKENS, WIDTH = 3, 4, 6


class BareTables(nn.Module):
    """Position table, adaLN table, gate and class token, as DiT, PixArt and ViT keep them."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, TOKENS, WIDTH))
        self.table = nn.Parameter(torch.randn(2, WIDTH))
        self.gate = nn.Parameter(torch.randn(()))
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        time = x.mean(1)
        shift, scale = (self.table[None] + torch.stack([time, -time], 1)).chunk(2, dim=1)
        x = (x + self.position) * (1 + scale) + shift
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1)
        return x + self.gate.tanh() * self.inner(x) + self.table.sum()


class Functional(nn.Module):
    """A layer's weight used behind the layer's back, and in the layer too."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.inner(x).tanh(), self.inner.weight.T)


class Unbatched(nn.Module):
    """A position embedding that is looked up once for the whole batch, as in CLIP."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Embedding(TOKENS, WIDTH)
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner((x + self.position(torch.arange(TOKENS)[None])).tanh())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


class CalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.inner(x).tanh())


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


class WeightNormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class _Cropped(nn.ConvTranspose1d):
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return super().forward(input, output_size)[..., 1:-1]


class OfUnknownKind(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = _Cropped(TOKENS, TOKENS, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(WIDTH))
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner(x)
        hidden += self.bias
        return hidden


class Folded(nn.Module):
    """Layers called on tokens folded into the batch, and on tokens in front of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.folded = nn.Linear(WIDTH, WIDTH)
        self.swapped = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        x = self.folded(x.flatten(0, 1)).view(x.shape)
        return self.swapped(x.transpose(0, 1)).transpose(0, 1)


class FoldedResiduals(nn.Module):
    """A deep stack on frames folded into the batch: many paths lead to each parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(40))

    def forward(self, x: Tensor) -> Tensor:
        hidden = x.flatten(0, 1)
        for block in self.blocks:
            hidden = hidden + 0.3 * block(hidden).tanh()
        return hidden.view(x.shape)


class Excursion(nn.Module):
    """Tokens in front, then samples, then tokens again, and a residual around it."""

    def __init__(self) -> None:
        super().__init__()
        self.swapped = nn.Linear(WIDTH, WIDTH)
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.swapped(x.transpose(0, 1))
        inner = self.inner(hidden.transpose(0, 1)).tanh()
        return (inner.transpose(0, 1) + hidden).transpose(0, 1)


class TokensFirst(nn.Module):
    """As torch's transformers have them unless told otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.inner = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, dropout=0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.first(x).transpose(0, 1)).transpose(0, 1)


class SamplesFirst(nn.Module):
    """Which puts tokens in front inside, all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.TransformerDecoderLayer(WIDTH, 2, 2 * WIDTH, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x.tanh())


class Coincidence(nn.Module):
    """Tables with as many rows as the batch, used without samples: the shape must not deceive."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Embedding(BATCH, WIDTH)
        self.lifted = nn.Linear(2, WIDTH)
        self.register_buffer("grid", torch.randn(BATCH, 2))
        self.row = nn.Parameter(torch.randn(1, WIDTH))
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :BATCH]  # as many tokens as samples
        table = self.position(torch.arange(BATCH)) + self.lifted(self.grid) + self.row.expand(BATCH, -1)
        return self.inner((x + table).tanh())


class Hadamard(torch.autograd.Function):
    """(a b) ∘ (c d), of which torch functions see nothing."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        ctx.save_for_backward(a, b, c, d)
        return (a @ b) * (c @ d)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        a, b, c, d = ctx.saved_tensors
        left, right = grads[0] * (c @ d), grads[0] * (a @ b)
        return left @ b.T, a.T @ left, right @ d.T, c.T @ right


class HiddenWeight(nn.Module):
    """A weight that a custom function makes of parameters, reshaped before, as LyCORIS' LoHa has it."""

    def __init__(self, rows: int = WIDTH, columns: int = WIDTH) -> None:
        super().__init__()
        shapes = (rows, 2), (2, columns), (rows, 2), (2, columns)
        self.factors = nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in shapes])
        self.longer = False  # there is an operation more

    def weight(self, like: Tensor) -> Tensor:
        parts = [p.to(like).reshape(p.size(0), -1) for p in self.factors if p.is_floating_point()]
        product: Tensor = Hadamard.apply(*parts)  # type: ignore[no-untyped-call]
        return product.reshape(product.shape)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x * 1 if self.longer else x, self.weight(x)).tanh()


class Series(nn.Module):
    """A rotation by the first powers of a skew matrix, as in OFT: operations take it twice."""

    def __init__(self) -> None:
        super().__init__()
        self.upper = nn.Parameter(torch.randn(WIDTH, WIDTH) / 4)

    def forward(self, x: Tensor) -> Tensor:
        skew = self.upper - self.upper.T
        square = skew @ skew
        rotation = torch.eye(WIDTH) + 2 * skew + 2 * square + 2 * square @ skew + square @ square
        return x @ rotation


class Keywords(nn.Module):
    """Layers called by keyword, and a bias trained alone before an in-place change of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.inner.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(input=x) * 1
        result = self.inner(input=hidden)
        if self.inner.weight.requires_grad is False:
            hidden = hidden.detach()
            hidden += 1
        return result + hidden


class LeftAside(nn.Module):
    """Of a modulation one part is not used, and half of what the last layer says: SiT's variances."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 1, 3 * WIDTH))
        self.modulation = nn.Linear(WIDTH, 3 * WIDTH)
        self.last = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        shift, scale, _ = (self.table + self.modulation(x)).chunk(3, dim=2)
        found, _ = self.last(x * (1 + scale) + shift).chunk(2, dim=2)
        return found


class Restraining(nn.Module):
    """As EDM2's forced weight normalisation: the forward writes to a weight that it has taken before."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(self.weight.dtype)
        with torch.no_grad():
            self.weight.copy_(weight.clamp(-1, 1))
        return x @ (weight / weight.norm(dim=1, keepdim=True)).t()


CASES = [
    Coincidence, Keywords, BareTables, Functional, Unbatched, Tied, CalledTwice, Attention, HiddenWeight,
    Series, WeightNormed, OfUnknownKind, InPlace, Folded, FoldedResiduals, Excursion, TokensFirst,
    LeftAside, Restraining,
]  # fmt: skip
