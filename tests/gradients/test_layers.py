"""Each layer rule keeps the contract of rules, and layers that it does not explain do not use it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffhook.errors import ConfigurationError, RecheckNeeded
from diffhook.gradients import PerSampleGradients
from diffhook.gradients.rules import Call, Factors, LayerRule, Product, register, rule_for
from diffhook.gradients.rules.conv import ConvRule
from diffhook.gradients.rules.conv_transpose import ConvTransposeRule
from diffhook.gradients.rules.embedding import EmbeddingRule
from diffhook.gradients.rules.linear import LinearRule
from diffhook.gradients.rules.normalization import GroupNormRule, LayerNormRule, RMSNormRule
from diffhook.gradients.rules.testing import LayerRuleContract
from tests.twins import projected, relative_error, sample_gradients

Layers = dict[str, tuple[nn.Module, tuple[int, ...]]]  # name → layer, shape of a batch


def squares(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
    # Nonlinear in the output, so that every output element has a gradient of its own.
    return model(batch[0]).tanh().square().flatten(1).sum(1)


LINEAR: Layers = {
    "flat": (nn.Linear(5, 3), (4, 5)),
    "tokens": (nn.Linear(5, 3), (4, 7, 5)),
    "two-axes": (nn.Linear(5, 3), (4, 2, 3, 5)),
    "wide": (nn.Linear(256, 300), (3, 4, 256)),
    "wide-flat": (nn.Linear(256, 300), (3, 256)),
    "one-token": (nn.Linear(64, 512), (3, 1, 64)),
}
CONV: Layers = {
    "conv1d": (nn.Conv1d(4, 6, 3, padding=1), (3, 4, 9)),
    "conv1d-same-dilated": (nn.Conv1d(4, 6, 4, padding="same", dilation=2), (3, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, 3, padding=1), (3, 4, 8, 8)),
    "conv2d-1x1": (nn.Conv2d(4, 6, 1), (3, 4, 8, 8)),
    "conv2d-stride": (nn.Conv2d(4, 6, 3, stride=2, padding=1), (3, 4, 9, 8)),
    "conv2d-uneven-stride": (nn.Conv2d(4, 6, (3, 2), stride=(2, 3), padding=(0, 1)), (3, 4, 9, 8)),
    "conv2d-valid": (nn.Conv2d(4, 6, 3, padding="valid"), (3, 4, 8, 8)),
    "conv2d-same-even-kernel": (nn.Conv2d(4, 6, 4, padding="same"), (3, 4, 8, 8)),
    "conv2d-dilated": (nn.Conv2d(4, 6, 3, padding=2, dilation=2), (3, 4, 8, 8)),
    "conv2d-groups": (nn.Conv2d(4, 6, 3, padding=1, groups=2), (3, 4, 8, 8)),
    "conv2d-depthwise": (nn.Conv2d(4, 8, 3, padding=1, groups=4), (3, 4, 8, 8)),
    "conv2d-reflect": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (3, 4, 8, 8)),
    "conv2d-circular": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (3, 4, 8, 8)),
    "conv3d": (nn.Conv3d(2, 4, 3, padding=1, stride=(1, 2, 1)), (3, 2, 4, 5, 6)),
    "conv3d-same": (nn.Conv3d(2, 4, (1, 3, 2), padding="same"), (3, 2, 4, 5, 6)),
}
TRANSPOSED: Layers = {
    "1d": (nn.ConvTranspose1d(4, 6, 3), (3, 4, 9)),
    "1d-stride": (nn.ConvTranspose1d(4, 6, 4, stride=2, padding=1), (3, 4, 5)),
    "2d": (nn.ConvTranspose2d(4, 6, 3, padding=1), (3, 4, 8, 8)),
    "2d-output-padding": (
        nn.ConvTranspose2d(4, 6, 3, stride=(2, 3), padding=(1, 0), output_padding=(1, 2)),
        (3, 4, 5, 4),
    ),
    "2d-dilated": (nn.ConvTranspose2d(4, 6, (3, 2), stride=2, padding=1, dilation=(2, 3)), (3, 4, 5, 4)),
    "2d-output-padding-beyond-the-stride": (
        nn.ConvTranspose2d(4, 6, 3, padding=(2, 0), output_padding=(1, 2), dilation=(2, 3)),
        (3, 4, 5, 4),
    ),
    "2d-padding-beyond-the-kernel": (nn.ConvTranspose2d(4, 6, 2, stride=2, padding=3), (3, 4, 6, 6)),
    "2d-groups": (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (3, 4, 5, 4)),
    "2d-depthwise": (nn.ConvTranspose2d(4, 8, 3, padding=1, groups=4), (3, 4, 5, 4)),
    "3d": (nn.ConvTranspose3d(2, 4, 3, stride=(1, 2, 1), padding=1), (3, 2, 3, 4, 5)),
    "3d-dilated": (
        nn.ConvTranspose3d(2, 4, (1, 3, 2), stride=2, output_padding=1, dilation=2),
        (3, 2, 3, 4, 2),
    ),
}
#: convolutions whose channels are mixed, and by whose size Gram matrices may be cheaper
WIDE: Layers = {
    "ghost": (nn.Conv2d(128, 160, 3, padding=1), (3, 128, 6, 7)),
    "ghost-unpadded": (nn.Conv2d(128, 128, 3), (3, 128, 8, 8)),
    "ghost-1d": (nn.Conv1d(128, 128, 5, padding=2), (3, 128, 20)),
    "ghost-3d": (nn.Conv3d(128, 128, 2, padding=1), (2, 128, 2, 3, 2)),
    "stride": (nn.Conv2d(128, 128, (3, 2), padding=(1, 0), stride=2), (3, 128, 8, 8)),
    "large-map": (nn.Conv2d(128, 128, 3, padding=1), (2, 128, 24, 24)),
    "groups": (nn.Conv2d(256, 128, 3, groups=2), (3, 256, 6, 6)),
}
WIDE_TRANSPOSED: Layers = {
    "wide-ghost": (nn.ConvTranspose2d(160, 128, 3, padding=1), (3, 160, 6, 7)),
    "wide-stride": (nn.ConvTranspose2d(128, 160, 4, padding=1, stride=2), (3, 128, 4, 4)),
    "wide-groups": (nn.ConvTranspose2d(256, 256, 3, groups=2), (3, 256, 4, 4)),
}
GROUPNORM: Layers = {
    "images": (nn.GroupNorm(2, 6), (3, 6, 5, 5)),
    "flat": (nn.GroupNorm(2, 6), (3, 6)),
    "tokens": (nn.GroupNorm(3, 6, eps=0.1), (3, 6, 7)),
}
LAYERNORM: Layers = {
    "tokens": (nn.LayerNorm(6), (3, 7, 6)),
    "flat": (nn.LayerNorm(6), (3, 6)),
    "two-axes": (nn.LayerNorm((5, 6), eps=0.1), (3, 2, 5, 6)),
}
RMSNORM: Layers = {
    "tokens": (nn.RMSNorm(6), (3, 7, 6)),
    "eps": (nn.RMSNorm(6, eps=0.1), (3, 7, 6)),
    "two-axes": (nn.RMSNorm((5, 6)), (3, 2, 5, 6)),
}

_HALF = {torch.float32: 1e-5, torch.float64: 1e-9, torch.bfloat16: 0.03}


def _drawn(layers: Layers) -> dict[str, tuple[nn.Module, Tensor]]:
    torch.manual_seed(2)
    return {name: (layer, torch.randn(shape)) for name, (layer, shape) in layers.items()}


class TestLinear(LayerRuleContract):
    rule = LinearRule
    dtypes = _HALF

    def problems(self) -> dict[str, tuple[nn.Module, Tensor]]:
        return _drawn(LINEAR)


class TestConv(LayerRuleContract):
    rule = ConvRule
    dtypes = _HALF

    def problems(self) -> dict[str, tuple[nn.Module, Tensor]]:
        return _drawn(CONV)


class TestConvTranspose(LayerRuleContract):
    rule = ConvTransposeRule
    dtypes = _HALF

    def problems(self) -> dict[str, tuple[nn.Module, Tensor]]:
        return _drawn(TRANSPOSED)


class TestGroupNorm(LayerRuleContract):
    rule = GroupNormRule

    def problems(self) -> dict[str, tuple[nn.Module, Tensor]]:
        return _drawn(GROUPNORM)


class TestLayerNorm(LayerRuleContract):
    rule = LayerNormRule

    def problems(self) -> dict[str, tuple[nn.Module, Tensor]]:
        return _drawn(LAYERNORM)


class TestRMSNorm(LayerRuleContract):
    rule = RMSNormRule

    def problems(self) -> dict[str, tuple[nn.Module, Tensor]]:
        return _drawn(RMSNORM)


class TestEmbedding(LayerRuleContract):
    rule = EmbeddingRule

    def problems(self) -> dict[str, tuple[nn.Module, Tensor]]:
        torch.manual_seed(2)
        return {
            f"{shape}, padding_idx={padding}": (
                nn.Embedding(6, 5, padding_idx=padding),
                torch.randint(0, 6, shape),
            )
            for shape in ((4,), (4, 9), (4, 2, 3))
            for padding in (None, 2)
        }


class _Pooled(nn.Module):
    """A matrix on the sum of all tokens: the output has one, where its gradient's factors have several."""

    def __init__(self, inward: int, outward: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.empty(outward, inward))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.sum(1), self.matrix)


@register
class _PooledRule(LayerRule[_Pooled]):
    modules = (_Pooled,)
    parameters = ("matrix",)
    gives_factors = True

    def samples_first(self, module: _Pooled, inputs: Tensor) -> bool:
        return inputs.dim() == 3

    def mixes_channels(self, module: _Pooled) -> bool:
        return False

    def products(self, call: Call[_Pooled]) -> Iterator[tuple[str, Product]]:
        tokens = call.inputs.to(call.grad_output.dtype)
        yield "matrix", Factors(call.grad_output[:, None].expand(-1, tokens.shape[1], -1), tokens)


class TestRuleOfAUser(LayerRuleContract):
    rule = _PooledRule

    def problems(self) -> dict[str, tuple[nn.Module, Tensor]]:
        sizes = {"narrow": (5, 3), "one-token-in-the-output": (256, 64), "wide": (256, 256)}
        return _drawn({name: (_Pooled(*size), (3, 4, size[0])) for name, size in sizes.items()})


@pytest.mark.parametrize("dim", [0, 2048])
@pytest.mark.parametrize("name", [*WIDE, *WIDE_TRANSPOSED])
def test_a_wide_convolution_needs_no_product(name: str, dim: int) -> None:
    torch.manual_seed(1)
    layer, shape = {**WIDE, **WIDE_TRANSPOSED}[name]
    batch = (torch.randn(shape),)
    expected = sample_gradients(layer, squares, batch)
    engine = PerSampleGradients(layer, projection_dim=dim)
    for _ in range(2):  # the first is checked, for which products are formed
        with engine:
            squares(layer, batch).mean().backward()
    assert engine.coverage.ruled == ("weight", "bias")
    assert relative_error(engine.norms[:, None], expected.norm(dim=1, keepdim=True)) < 1e-5
    if dim:
        assert relative_error(engine.projections, projected(engine.sketch, layer, expected)) < 1e-5


def _check(model: nn.Module, batch: tuple[Tensor, ...], fallback: tuple[str, ...] = ()) -> None:
    engine = PerSampleGradients(model, projection_dim="full")
    expected = sample_gradients(model, squares, batch)
    found = []
    for _ in range(3):  # the first is checked, and may be discarded
        try:
            with engine:
                squares(model, batch).mean().backward()
        except RecheckNeeded:
            continue
        assert engine.coverage.fallback == fallback
        assert relative_error(engine.projections, expected) < 1e-5
        found.append(engine.projections)
    assert len(found) > 1


@pytest.mark.parametrize("reuse", [False, True])
def test_an_output_size_is_followed(reuse: bool) -> None:
    """A transposed convolution by stride 2 may answer with either of two sizes."""

    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x, output_size=(10, 9)).cos() + self.up(x, [10, 9])

    model, batch = Sized(), (torch.randn(3, 4, 5, 5),)
    engine = PerSampleGradients(model, projection_dim="full", reuse_products=reuse)
    for _ in range(2):
        with engine:
            squares(model, batch).mean().backward()
        assert engine.coverage.ruled == ("up.weight", "up.bias")
        assert relative_error(engine.projections, sample_gradients(model, squares, batch)) < 1e-5


class _Unbatched(nn.Module):
    """Calls its layer on what is no batch, though as long as one, and on each sample alike."""

    def __init__(self, layer: nn.Module, table: Tensor) -> None:
        super().__init__()
        self.layer, self.out = layer, nn.Linear(5, 5)
        self.register_buffer("table", table)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x) * self.layer(self.table).sin().mean()


UNBATCHED: Layers = {
    "conv1d": (nn.Conv1d(4, 4, 3), (4, 6)),
    "conv2d": (nn.Conv2d(4, 4, 3), (4, 6, 6)),
    "transposed": (nn.ConvTranspose1d(4, 4, 3), (4, 6)),
    "linear": (nn.Linear(4, 4), (4,)),
    "layernorm": (nn.LayerNorm((4, 3)), (4, 3)),
    "rmsnorm": (nn.RMSNorm(4), (4,)),
}


@pytest.mark.parametrize("name", UNBATCHED)
def test_a_rule_says_which_calls_have_no_samples_in_front(name: str) -> None:
    torch.manual_seed(1)
    layer, shape = UNBATCHED[name]
    layer.reset_parameters()  # drawn at import, from no seed
    model = _Unbatched(layer, torch.randn(shape))
    rule = rule_for(layer)
    assert rule is not None
    assert not rule.samples_first(layer, model.table)
    assert rule.samples_first(layer, model.table[None])
    names = tuple(f"layer.{local}" for local, _ in layer.named_parameters())
    _check(model, (torch.randn(4, 5),), fallback=names)


def test_a_subclass_with_its_own_forward_does_not_use_the_parents_rule() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model = Doubled(5, 3)
    _check(model, (torch.randn(4, 5),), fallback=("weight", "bias"))


# ── registration ──────────────────────────────────────────────────────────────────────────────────


def test_a_rule_that_leaves_out_an_answer_is_refused_with_what_is_missing() -> None:
    class Bare(LayerRule[nn.PReLU]):
        parameters = ("weight",)

        def products(self, call: Call[nn.PReLU]) -> Iterator[tuple[str, Product]]:
            yield "weight", call.grad_output

    with pytest.raises(ConfigurationError) as raised:
        register(Bare)
    assert str(raised.value) == (
        "Bare is no layer rule yet: it leaves out modules, a tuple of the layer classes that it is for; "
        "samples_first(module, inputs), which says whether row b of such a call is sample b; "
        "mixes_channels(module), which says whether products may mix the channels of a weight"
    )
    assert rule_for(nn.PReLU()) is None


@pytest.mark.parametrize("name", ["modules", "parameters", "samples_first", "mixes_channels", "products"])
def test_every_question_must_be_answered(name: str) -> None:
    answers = {k: getattr(LinearRule, k) for k in dir(LinearRule) if not k.startswith("__")}
    answers["modules"] = (nn.PReLU,)
    del answers[name]
    with pytest.raises(ConfigurationError, match=rf"^Partial is no layer rule yet: it leaves out {name}\b"):
        register(type("Partial", (LayerRule,), answers))


@pytest.mark.parametrize(
    ("name", "answer"), [("modules", nn.PReLU), ("parameters", "weight"), ("mixes_channels", False)]
)
def test_an_answer_of_another_kind_is_refused(name: str, answer: object) -> None:
    with pytest.raises(ConfigurationError, match=rf"^Odd.{name} is .*; expected {name}"):
        register(type("Odd", (LinearRule,), {"modules": (nn.PReLU,), name: answer}))
    assert rule_for(nn.PReLU()) is None
