"""Parameters without a layer rule: exact all the same, or named."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffhook.gradients import PerSampleGradients
from tests.twins import relative_error, sample_gradients

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


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ConvTranspose1d(TOKENS, TOKENS, 3, stride=2)

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


CASES = [
    Coincidence, Keywords, BareTables, Functional, Unbatched, Tied, CalledTwice, Attention,
    WeightNormed, Transposed, InPlace, Folded,
]  # fmt: skip


def _losses(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
    return model(batch[0]).tanh().square().flatten(1).sum(1)


@pytest.mark.parametrize("weight_gradients", [True, False], ids=["in-step", "probe"])
@pytest.mark.parametrize("kind", CASES)
def test_every_parameter_is_exact(kind: type[nn.Module], weight_gradients: bool) -> None:
    torch.manual_seed(0)
    model = kind()
    engine = PerSampleGradients(model, projection_dim="full", weight_gradients=weight_gradients)
    for _ in range(3):  # the first pass surveys, later ones watch only what it found
        batch = (torch.randn(BATCH, TOKENS, WIDTH),)
        expected = sample_gradients(model, _losses, batch)
        with engine:
            _losses(model, batch).mean().backward()
        assert engine.coverage.complete
        assert relative_error(engine.projections, expected) < 1e-5
        assert relative_error(engine.norms[:, None], expected.norm(dim=1, keepdim=True)) < 1e-5


@pytest.mark.parametrize("kind", CASES)
def test_autocast_does_not_make_the_survey_suspicious(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, batch = kind(), (torch.randn(BATCH, TOKENS, WIDTH),)
    expected = sample_gradients(model, _losses, batch)
    engine = PerSampleGradients(model, projection_dim="full")
    with engine, torch.autocast("cpu", torch.bfloat16):
        _losses(model, batch).mean().backward()
    assert engine.coverage.complete, engine.coverage
    # bfloat16 keeps 8 bits: the activations themselves are off by 1/256 or so.
    assert relative_error(engine.norms[:, None], expected.norm(dim=1, keepdim=True)) < 0.05


@pytest.mark.parametrize("kind", CASES)
def test_the_survey_leaves_gradients_bit_identical(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, batch = kind(), (torch.randn(BATCH, TOKENS, WIDTH),)
    _losses(model, batch).mean().backward()
    plain = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    with PerSampleGradients(model):
        _losses(model, batch).mean().backward()
    watched = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))


def test_what_cannot_be_split_by_sample_is_named_in_coverage_and_one_warning() -> None:
    class Regularised(nn.Module):
        """Its penalty reaches the loss without ever meeting a sample."""

        def __init__(self) -> None:
            super().__init__()
            self.penalised = nn.Parameter(torch.randn(WIDTH))
            self.inner = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            self.penalty = self.penalised.square().sum()
            return self.inner(x)

    model, batch = Regularised(), (torch.randn(BATCH, TOKENS, WIDTH),)
    engine = PerSampleGradients(model)
    with pytest.warns(UserWarning, match=r"leave out 1 of 3 .*penalised \(its uses never met"):
        with engine:
            (_losses(model, batch).mean() + model.penalty).backward()
    assert set(engine.coverage.missing) == {"penalised"}
    assert engine.coverage.ruled == ("inner.weight", "inner.bias")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with engine:
            (_losses(model, batch).mean() + model.penalty).backward()


@pytest.mark.parametrize("kind", CASES)
def test_no_tensor_outlives_the_pass(kind: type[nn.Module]) -> None:
    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    model = kind()
    engine = PerSampleGradients(model, weight_gradients=False)
    counts = []
    for _ in range(4):
        with engine:
            _losses(model, (torch.randn(BATCH, TOKENS, WIDTH),)).mean().backward()
        counts.append(alive())
    assert counts[1] == counts[-1], f"tensors alive after each pass: {counts}"
