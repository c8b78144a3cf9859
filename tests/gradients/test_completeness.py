"""Rows are right where a layer does not compute what its class does, or is changed during training."""

from __future__ import annotations

import types
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from diffhook.errors import RecheckNeeded
from diffhook.gradients import PerSampleGradients
from tests.gradients.passes import BATCH, WIDTH, Layers, alone, passes, sample_losses
from tests.twins import relative_error


def _net(change: Callable[[nn.Conv2d], Any], conv: type[nn.Conv2d] = nn.Conv2d) -> Layers:
    def make() -> nn.Module:
        last = conv(4, 4, 3)
        model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), last)
        change(last)
        return model

    return make


def _twice_the_weight(layer: nn.Conv2d) -> None:
    layer.forward = lambda x: F.conv2d(x, 2 * layer.weight, layer.bias)  # type: ignore[method-assign]


def _standardised(layer: nn.Conv2d) -> None:
    def forward(self: nn.Conv2d, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias)

    layer.forward = types.MethodType(forward, layer)  # type: ignore[method-assign]


def _scaled_output(layer: nn.Conv2d) -> None:
    original = layer.forward
    layer.forward = lambda x: 0.3 * original(x)  # type: ignore[method-assign]


def _circular(layer: nn.Conv2d) -> None:
    def forward(self: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias)

    layer._conv_forward = types.MethodType(forward, layer)  # type: ignore[method-assign]


class _Seamless(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(F.pad(input, (1, 0, 2, 0)), weight.flip(0), bias)


class _Cropped(nn.ConvTranspose2d):
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return super().forward(input, output_size)[..., 1:-1, 1:-1]


class _Callable(nn.Conv2d):
    def __call__(self, x: Tensor) -> Tensor:
        return 2 * super().__call__(x.roll(1, 2))  # type: ignore[no-any-return]


DERIVED: dict[str, Layers] = {
    "prune-structured": _net(lambda layer: prune.ln_structured(layer, "weight", 0.5, 2, 0)),
    "prune-random": _net(lambda layer: prune.random_unstructured(layer, "weight", 0.4)),
    "prune-bias": _net(lambda layer: prune.random_unstructured(layer, "bias", 2)),
    "weight-norm-old": _net(lambda layer: nn.utils.weight_norm(layer)),
    "weight-norm": _net(lambda layer: parametrizations.weight_norm(layer)),
    "spectral-norm-old": _net(lambda layer: nn.utils.spectral_norm(layer).eval()),
    "spectral-norm": _net(lambda layer: parametrizations.spectral_norm(layer).eval()),
    "orthogonal": lambda: nn.Sequential(nn.Flatten(), parametrizations.orthogonal(nn.Linear(2 * 36, 4))),
    "forward-scaled-weight": _net(_twice_the_weight),
    "forward-standardised-weight": _net(_standardised),
    "forward-scaled-output": _net(_scaled_output),
    "conv-forward-patched": _net(_circular),
    "conv-forward-overridden": _net(lambda layer: None, _Seamless),
    "call-overridden": _net(lambda layer: None, _Callable),
    "transposed-cropped": lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), _Cropped(4, 3, 3, stride=2)),
    "pruned-alone": lambda: prune.ln_structured(nn.Conv2d(2, 4, 3), "weight", 0.5, 2, 0),
    "weight-norm-alone": lambda: nn.utils.weight_norm(nn.Conv2d(2, 4, 3)),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("weight_gradients", [True, False], ids=["in-step", "probe"])
@pytest.mark.parametrize("name", DERIVED)
def test_a_layer_that_does_not_compute_what_its_class_does_is_exact(
    name: str, weight_gradients: bool
) -> None:
    torch.manual_seed(0)
    model = DERIVED[name]()
    engine = PerSampleGradients(model, projection_dim="full", weight_gradients=weight_gradients)
    for _ in range(3):
        batch = (torch.randn(BATCH, 2, 6, 6),)
        expected = alone(model, batch)
        with engine:
            sample_losses(model, batch).mean().backward()
        assert engine.coverage.complete, engine.coverage
        assert relative_error(engine.projections, expected) < 1e-5


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: prune.random_unstructured(layer, "weight", 0.4),
        lambda layer: nn.utils.spectral_norm(layer).eval(),
        _twice_the_weight,
        _circular,
    ],
    ids=["pruned", "spectral-norm", "forward", "conv-forward"],
)
def test_a_layer_that_is_changed_during_training_costs_a_pass(change: Callable[[nn.Conv2d], Any]) -> None:
    torch.manual_seed(0)
    model = _net(lambda layer: None)()
    batch = (torch.randn(BATCH, 2, 6, 6),)
    engine = PerSampleGradients(model, projection_dim=0)
    for step in range(4):
        if step == 1:
            change(model[2])  # type: ignore[index]
        expected = alone(model, batch).norm(dim=1)
        if step == 1:
            with pytest.raises(RecheckNeeded, match=r"^2 is used in another way") as raised, engine:
                sample_losses(model, batch).mean().backward()
            assert (raised.value.law, raised.value.names) == ("usage", ("2",))
            continue
        with engine:
            sample_losses(model, batch).mean().backward()
        torch.testing.assert_close(engine.norms, expected.float(), rtol=1e-5, atol=0)


def test_a_wrong_rule_is_found_out_and_its_layer_goes_to_the_fallback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A class-level patch, which no look at the instance shows."""
    original = F.linear
    monkeypatch.setattr(F, "linear", lambda x, w, b=None: original(x, w, b))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
    rule = PerSampleGradients(model)._assignment.layers["2"].rule
    products = type(rule).products

    def wrong(*args: Any) -> Any:
        for local, product in products(*args):
            yield local, product * 1.05 if isinstance(product, Tensor) else product

    engine = PerSampleGradients(model, projection_dim="full")
    monkeypatch.setattr(type(rule), "products", wrong)
    batches = [(torch.randn(BATCH, 3, WIDTH),) for _ in range(3)]
    assert passes(engine, batches, alone) == 1
    assert engine.coverage.ruled == ()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_hides_no_wrong_rule_and_long_sums_are_not_taken_for_one(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 32), nn.LayerNorm(32), nn.Linear(32, WIDTH), nn.LayerNorm(WIDTH))
    batch = (torch.randn(8, 1024, WIDTH),)
    for factor in (1.0, 1.05):
        rule = PerSampleGradients(model)._assignment.layers["2"].rule
        products = type(rule).products

        def scaled(*args: Any, products: Any = products, factor: float = factor) -> Any:
            for local, product in products(*args):
                yield local, product * factor if isinstance(product, Tensor) else product

        monkeypatch.setattr(type(rule), "products", scaled)
        engine = PerSampleGradients(model, projection_dim=0)
        right = nullcontext() if factor == 1 else pytest.raises(RecheckNeeded)
        with right, engine, torch.autocast("cpu", dtype):
            sample_losses(model, batch).mean().backward()
        assert bool(engine.coverage.fallback) == (factor != 1)


def test_a_gradient_that_a_hook_changes_is_named() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
    model[0].weight.register_hook(lambda gradient: gradient * torch.eye(WIDTH))
    engine = PerSampleGradients(model, projection_dim="full")
    batch = (torch.randn(BATCH, WIDTH),)
    with pytest.raises(RecheckNeeded) as raised, engine:
        sample_losses(model, batch).mean().backward()
    assert (raised.value.law, raised.value.names) == ("completeness", ("0.weight",))
    for expectation in (pytest.warns(UserWarning, match="leave out 1 of 4"), nullcontext()):
        with expectation, engine:
            sample_losses(model, batch).mean().backward()
        assert dict(engine.coverage.missing) == {
            "0.weight": "a hook on the parameter changes the gradient that training uses"
        }
        expected = alone(model, batch)
        expected[:, : WIDTH * WIDTH] = 0
        assert relative_error(engine.projections, expected) < 1e-5
