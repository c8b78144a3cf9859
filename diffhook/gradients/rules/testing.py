"""The contract of a layer rule as tests: a rule's test inherits :class:`LayerRuleContract` and names layers.

Run by pytest; nothing of pytest is needed. Every number is compared with batch-size-1 autograd in float64.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffhook.gradients.engine import PerSampleGradients
from diffhook.gradients.rules.call import Call, Factors, Mixers, Product, Reduced
from diffhook.gradients.rules.factors import formed
from diffhook.gradients.rules.registry import LayerRule, rule_for
from diffhook.gradients.sketch import Sketch

_DIMS = (0, 300, 2048)
_DECLINED = (
    "the layer was left to the fallback: either samples_first says no, or its parameters do not enter, as "
    "they are, in the operation that makes its output"
)
_ROUNDING = 1e-7  # norms are float32, of any layer
_MIXED = 3  # channels that the contract mixes a convolution down to


class _Model(nn.Module):
    """Adds up what a layer answers to each of several inputs, by a function that gives every number of every
    answer a gradient of its own.

    Args:
        layer: the layer.
        turned: its output's gradient comes with the batch last in memory.
    """

    def __init__(self, layer: nn.Module, turned: bool = False) -> None:
        super().__init__()
        self.layer = layer
        self._turned = turned

    def forward(self, *calls: Tensor) -> Tensor:
        output: Tensor = self.layer(calls[0]).sin()
        for inputs in calls[1:]:
            output = output + self.layer(inputs).sin()  # each call has another gradient
        return output.movedim(0, -1).contiguous().movedim(-1, 0) if self._turned else output


def losses_of(model: nn.Module, calls: tuple[Tensor, ...]) -> Tensor:
    """(B,) losses."""
    losses: Tensor = model(*calls).square().flatten(1).sum(1)
    return losses


class LayerRuleContract(ABC):
    """What holds of a rule, for every layer that its author names.

    Attributes:
        rule: the rule; registered.
        dtypes: of layers → largest error of a sample's gradient, relative to its norm.
        optional: parameters that a layer may have been made without, and is also tested without.
    """

    rule: ClassVar[type[LayerRule[Any]]]
    dtypes: ClassVar[Mapping[torch.dtype, float]] = {torch.float32: 1e-5, torch.float64: 1e-9}
    optional: ClassVar[tuple[str, ...]] = ("bias",)

    @abstractmethod
    def problems(self) -> Mapping[str, tuple[nn.Module, Tensor]]:
        """name → a layer and a batch for it, (B, …) with B > 1.

        Name one for each argument of the layer that its gradient depends on, uneven and large values among
        them, and one for each number of axes that its input may have.
        """

    def test_gradients_are_the_batch_1_loops(self) -> None:
        for name, layer, inputs in self._layers():
            self._check(name, _Model(layer), (inputs,))
            self._check(f"{name}, a probe", _Model(layer), (inputs,), weight_gradients=False)

    def test_norms_and_projections_are_the_batch_1_loops(self) -> None:
        for name, layer, inputs in self._layers():
            for dim in _DIMS:
                self._check(name, _Model(layer), (inputs,), dim)

    def test_several_calls_add_up_before_the_norm_is_taken(self) -> None:
        for name, layer, inputs in self._layers():
            other = inputs.flip(-1) if inputs.dim() > 1 else inputs
            for dim in ("full", *_DIMS):
                self._check(f"{name}, called twice", _Model(layer), (inputs, other), dim)

    def test_strides_do_not_matter(self) -> None:
        for name, layer, inputs in self._layers():
            backwards = tuple(reversed(range(inputs.dim())))
            strided = {
                "axes reversed": inputs.permute(backwards).contiguous().permute(backwards),
                "gaps between": torch.stack([inputs, inputs], -1)[..., 0],
            }
            for how, values in strided.items():
                if values.is_floating_point():  # as of an input that other layers have made
                    values.requires_grad_()
                self._check(f"{name}, {how}", _Model(layer, turned=True), (values,))

    def test_a_batch_may_be_cut(self) -> None:
        for name, layer, inputs in self._layers():
            for dim in ("full", 0):
                self._check(f"{name}, sample by sample", _Model(layer), (inputs,), dim, workspace=1)

    def test_only_what_is_trained_counts(self) -> None:
        for name, layer, inputs in self._layers():
            parameters = dict(layer.named_parameters(recurse=False))
            for frozen in parameters if len(parameters) > 1 else ():
                model = _Model(copy.deepcopy(layer))
                model.layer.get_parameter(frozen).requires_grad_(False)
                self._check(f"{name}, {frozen} frozen", model, (inputs,))

    def test_summed_gradients_may_be_had_from_the_products(self) -> None:
        for name, layer, inputs in self._layers():
            self._check(f"{name}, products reused", _Model(layer), (inputs,), reuse_products=True)

    def test_what_stands_for_a_product_says_the_same(self) -> None:
        """Norms of gradients that are not formed, and mixed channels where the rule says that it may."""
        for name, layer, inputs in self._layers():
            layer, inputs = layer.double(), _double(inputs)
            grad = torch.randn_like(layer(inputs))
            exact = _products(layer, inputs, grad)
            for local, gradient in exact.items():
                for mixers in self._asked(layer, gradient):
                    call = Call(layer, inputs, grad.detach(), (local,), {local: mixers})
                    found = dict(self.rule().products(call))
                    assert found.keys() == {local}, f"{name}: products of {set(found)}, not of {local}"
                    _compare(f"{name}, {local} not formed", found[local], gradient, mixers)

    def test_products_of_half_precision_add_up_in_float32(self) -> None:
        """Of a rule that takes them: float32, and as near as the layer's own precision allows."""
        for name, layer, inputs in self._layers() if self.rule.takes_half else ():
            layer, inputs = layer.bfloat16(), _as(torch.bfloat16, inputs)
            grad = torch.randn_like(layer(inputs))
            exact = _products(copy.deepcopy(layer).double(), _double(inputs), grad.double())
            for mixers in ({}, dict.fromkeys(exact)):
                call = Call(layer, inputs, grad.detach(), tuple(exact), mixers)
                for local, product in self.rule().products(call):
                    told = f"{name}, {local} of bfloat16"
                    found = formed(product) if isinstance(product, Factors) else product
                    found = found.norms if isinstance(found, Reduced) else found
                    assert found.dtype == torch.float32, f"{told}: {found.dtype}"
                    _compare(told, product, exact[local], None, 2**-8)

    # ── how ───────────────────────────────────────────────────────────────────────────────────

    def _layers(self) -> Iterator[tuple[str, nn.Module, Tensor]]:
        """Each problem as it is, and without each parameter that is optional."""
        torch.manual_seed(1)
        for name, (given, inputs) in self.problems().items():
            layer = copy.deepcopy(given)
            for parameter in layer.parameters():
                nn.init.normal_(parameter, std=parameter.shape[1:].numel() ** -0.5)
            yield name, layer, inputs
            for local in self.optional:
                if getattr(layer, local, None) is not None and len(list(layer.parameters())) > 1:
                    bare = copy.deepcopy(layer)
                    bare.register_parameter(local, None)
                    yield f"{name}, no {local}", bare, inputs

    def _asked(self, layer: nn.Module, gradient: Tensor) -> list[Mixers | None]:
        if gradient.dim() < 4 or not self.rule().mixes_channels(layer):
            return [None]
        outward, inward = gradient.shape[1:3]
        sides = [torch.randn(n, _MIXED, dtype=torch.float64) for n in (inward, outward)]
        return [None, Mixers(sides[0], sides[1], 1 / _MIXED)]

    def _check(
        self, name: str, model: _Model, calls: tuple[Tensor, ...], dim: Any = "full", **options: Any
    ) -> None:
        """An engine's rows of two passes, of which the first is checked, beside the twin's."""
        for dtype, tolerance in self.dtypes.items():
            model, calls = copy.deepcopy(model).to(dtype), tuple(_as(dtype, inputs) for inputs in calls)
            told = f"{name}, {dtype}, projection_dim={dim}"
            assert isinstance(rule_for(model.layer), self.rule), f"{told}: the layer has another rule"
            expected = _twin(model, calls)
            engine = PerSampleGradients(model, projection_dim=dim, **options)
            for _ in range(2):
                model.zero_grad()
                with engine:
                    losses_of(model, calls).mean().backward()
                assert not engine.coverage.fallback, f"{told}: {_DECLINED}"
                assert engine.coverage.complete, f"{told}: {engine.coverage}"
                exact = _norms(expected)
                _near(f"{told}: norms", engine.norms[:, None], exact, max(tolerance, _ROUNDING))
                if dim:
                    exact = _projected(engine, model, expected)
                    _near(f"{told}: projections", engine.projections, exact, tolerance)
                if options.get("weight_gradients", True):
                    summed = torch.cat([p.grad.flatten() for p in _trained(model).values()])  # type: ignore[union-attr]
                    _near(f"{told}: .grad", summed[None], expected.mean(0)[None], 10 * tolerance)


# ── the twin ──────────────────────────────────────────────────────────────────────────────────────


def _double(values: Tensor) -> Tensor:
    return _as(torch.float64, values)


def _as(dtype: torch.dtype, values: Tensor) -> Tensor:
    """Indices stay what they are; strides, too."""
    if not values.is_floating_point():
        return values
    return values.detach().to(dtype).requires_grad_(values.requires_grad)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _twin(model: nn.Module, calls: tuple[Tensor, ...]) -> Tensor:
    """(B, P): the gradient of each sample's own loss, one sample at a time."""
    twin = copy.deepcopy(model).double()
    parameters = list(_trained(twin).values())
    rows = []
    for sample in range(len(calls[0])):
        one = tuple(_double(inputs[sample : sample + 1]) for inputs in calls)
        shares = torch.autograd.grad(losses_of(twin, one).sum(), parameters)
        rows.append(torch.cat([share.flatten() for share in shares]))
    return torch.stack(rows)


def _projected(engine: PerSampleGradients, model: nn.Module, gradients: Tensor) -> Tensor:
    """(B, D): the projection of whole gradients, all of them formed."""
    sketch, parameters = engine.sketch, _trained(model)
    if not isinstance(sketch, Sketch):
        return gradients
    parts = gradients.split([p.numel() for p in parameters.values()], 1)
    named = zip(parameters.items(), parts, strict=True)
    return sketch.project({name: part.reshape(-1, *p.shape) for (name, p), part in named})


def _products(layer: nn.Module, inputs: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Parameter → (B, *shape) gradients of ⟨output, grad⟩."""
    parameters = dict(layer.named_parameters(recurse=False))
    rows = [
        torch.autograd.grad(layer(one), list(parameters.values()), its_grad)
        for one, its_grad in zip(inputs.split(1), grad.split(1), strict=True)
    ]
    return {name: torch.stack([row[place] for row in rows]) for place, name in enumerate(parameters)}


def _compare(
    told: str, product: Product, exact: Tensor, mixers: Mixers | None, tolerance: float = 1e-9
) -> None:
    """Whether a product, or what stands for it, is that of the exact (B, *shape) gradients."""
    if isinstance(product, Factors):
        product = formed(product)
    if isinstance(product, Tensor):
        _near(told, product, exact, tolerance)
        return
    assert isinstance(product, Reduced), f"{told}: a {type(product).__name__} is no product"
    squares = product.norms if product.squared else product.norms.square()
    _near(f"{told}: norms", squares.sum(1, keepdim=True).sqrt(), _norms(exact.flatten(1)), tolerance)
    if mixers is not None:
        assert product.mixed is not None, f"{told}: mixed channels were asked for"
        mixed = torch.einsum("boi...,ip,oq->bqp...", exact, mixers.inward, mixers.outward) * mixers.scale
        _near(f"{told}: mixed channels", product.mixed, mixed, tolerance)


def _norms(rows: Tensor) -> Tensor:
    return rows.norm(dim=1, keepdim=True)


def _near(told: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    found, expected = found.double().flatten(1), expected.double().flatten(1)
    error = float(((found - expected).norm(dim=1) / expected.norm(dim=1).clamp_min(1e-300)).max())
    assert error <= tolerance, f"{told} are off by {error:.1e} of a sample's; at most {tolerance:.0e}"
