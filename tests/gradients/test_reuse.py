"""Summed gradients taken from per-sample products are autograd's, up to rounding."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffhook.errors import CaptureError
from diffhook.gradients import PerSampleGradients
from diffhook.gradients.accumulator import PassAccumulator
from tests.models import PROBLEMS, Problem
from tests.twins import relative_error, sample_gradients


def _plain(problem: Problem) -> list[Tensor | None]:
    problem.model.zero_grad()
    problem.loss(problem.model, problem.batch).mean().backward()
    return [p.grad for p in problem.model.parameters()]


def _same(model: nn.Module, expected: list[Tensor | None]) -> None:
    # Some gradients are zero but for rounding (a key's bias moves all scores alike), hence the floor.
    floor = 1e-6 * max(float(g.norm()) for g in expected if g is not None)
    for (name, parameter), gradient in zip(model.named_parameters(), expected, strict=True):
        assert (parameter.grad is None) == (gradient is None), name
        if gradient is not None and parameter.grad is not None:
            scale = float(gradient.norm()) + floor
            assert float((parameter.grad - gradient).norm()) / scale < 1e-4, name
    assert all(p.requires_grad == (g is not None) for p, g in zip(model.parameters(), expected, strict=True))


def _passes(engine: PerSampleGradients, problem: Problem, count: int = 2) -> None:
    """The first pass surveys and finds out which products are formed; the next ones reuse them."""
    for _ in range(count):
        problem.model.zero_grad()
        with engine:
            problem.loss(problem.model, problem.batch).mean().backward()


@pytest.mark.parametrize("dim", [256, "full"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_gradients_norms_and_projections_are_the_same(name: str, dim: int) -> None:
    problem = PROBLEMS[name]()
    expected = _plain(problem)
    engine = PerSampleGradients(problem.model, projection_dim=dim, reuse_products=True)
    _passes(engine, problem)
    assert engine._reuse is not None
    assert len(engine._reuse.chosen) > 3, "nothing was reused, so nothing was tested"
    _same(problem.model, expected)
    exact = sample_gradients(problem.model, problem.loss, problem.batch)
    assert relative_error(engine.norms[:, None], exact.norm(dim=1, keepdim=True)) < 1e-5
    if dim == "full":
        assert relative_error(engine.projections, exact) < 1e-5


def test_wide_matrices_of_many_tokens_serve_training_too() -> None:
    torch.manual_seed(0)

    def losses(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().flatten(1).sum(1)

    problem = Problem(nn.Sequential(nn.Linear(256, 256), nn.Tanh()), losses, torch.randn(5, 160, 256))
    expected = _plain(problem)
    exact = sample_gradients(problem.model, problem.loss, problem.batch)
    for workspace in (None, 2 * 4 * 256 * 256):  # two samples at a time
        engine = PerSampleGradients(problem.model, reuse_products=True, workspace=workspace)
        _passes(engine, problem)
        assert engine._reuse is not None
        assert engine._reuse.chosen == {"0"}
        _same(problem.model, expected)
        assert relative_error(engine.norms[:, None], exact.norm(dim=1, keepdim=True)) < 1e-5
        plain = PerSampleGradients(problem.model)
        _passes(plain, problem, 1)
        assert relative_error(engine.projections, plain.projections) < 1e-5


class _Cut(torch.autograd.Function):
    """No gradient of the first argument, as some quantisers have it."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor) -> Tensor:
        return first + second

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return None, gradients[0]


class _PartlyCut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cut, self.whole = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = _Cut.apply(self.cut(images), self.whole(images))  # type: ignore[no-untyped-call]
        return found


@pytest.mark.parametrize("reuse", [False, True])
def test_a_layer_whose_gradient_never_comes_trains_as_without_us(reuse: bool) -> None:
    torch.manual_seed(0)

    def losses(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().flatten(1).sum(1)

    problem = Problem(_PartlyCut(), losses, torch.randn(5, 3, 6, 6))
    expected = _plain(problem)
    engine = PerSampleGradients(problem.model, projection_dim=64, reuse_products=reuse)
    _passes(engine, problem, 3)
    for parameter, gradient in zip(problem.model.parameters(), expected, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        if gradient is not None:
            torch.testing.assert_close(parameter.grad, gradient)
    twin = copy.deepcopy(problem.model).double()
    for image, norm in zip(problem.batch.double(), engine.norms.tolist(), strict=True):
        shares = torch.autograd.grad(losses(twin, image[None]).sum(), list(twin.whole.parameters()))
        assert norm == pytest.approx(float(torch.cat([s.flatten() for s in shares]).norm()), rel=1e-5)


class _Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.reentrant = reentrant

    def forward(self, inputs: Tensor) -> Tensor:
        def block(tensor: Tensor) -> Tensor:
            return self.second(self.first(tensor).tanh())

        inputs = inputs.clone().requires_grad_(True)
        output: Tensor = checkpoint(block, inputs, use_reentrant=self.reentrant)
        return output


def _checkpointed(reentrant: bool) -> Problem:
    torch.manual_seed(0)

    def losses(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).tanh().square().flatten(1).sum(1)

    return Problem(_Checkpointed(reentrant), losses, torch.randn(4, 3, 6))


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_gradient_checkpointing(reentrant: bool) -> None:
    problem = _checkpointed(reentrant)
    model = problem.model
    expected = _plain(problem)
    engine = PerSampleGradients(model, projection_dim="full", reuse_products=True)
    _passes(engine, problem)
    _same(model, expected)
    model.reentrant = False  # torch.autograd.grad, which the twin uses, does not see through it
    assert relative_error(engine.projections, sample_gradients(model, problem.loss, problem.batch)) < 1e-5


@pytest.mark.parametrize("leave", [False, True], ids=["abandoned", "left"])
@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("reentrant", [True, False])
def test_the_backward_of_a_pass_that_was_given_up_is_the_plain_one(
    reentrant: bool, reuse: bool, leave: bool
) -> None:
    problem = _checkpointed(reentrant)
    model = problem.model
    expected = _plain(problem)
    engine = PerSampleGradients(model, projection_dim=64, reuse_products=reuse)
    _passes(engine, problem, 1)
    for _ in range(2):
        model.zero_grad()
        engine.attach()
        engine.begin()
        losses = problem.loss(model, problem.batch).mean()
        engine.detach(mid_pass=True) if leave else engine.abandon()
        losses.backward()
        _same(model, expected)
    problem.loss(model, problem.batch)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in (model.first, model.second))


def test_a_failure_of_ours_leaves_the_gradients_right(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = PROBLEMS["unet"]()
    expected = _plain(problem)
    engine = PerSampleGradients(problem.model, projection_dim=64, reuse_products=True)
    _passes(engine, problem, 1)
    original, calls = PassAccumulator.add_layer, []

    def failing(*args: object) -> None:
        calls.append(1)
        original(*args)  # type: ignore[arg-type]
        if len(calls) == 5:
            raise RuntimeError("disk on fire")

    monkeypatch.setattr(PassAccumulator, "add_layer", failing)
    with pytest.raises(CaptureError, match="disk on fire"):
        _passes(engine, problem, 1)
    _same(problem.model, expected)


def test_a_batch_of_another_kind_leaves_the_gradients_right() -> None:
    """A layer that was per sample in the first pass, and is called on folded rows in the next."""

    class Folding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)
            self.fold = False

        def forward(self, inputs: Tensor) -> Tensor:
            if not self.fold:
                return self.layer(inputs)
            return self.layer(inputs.flatten(0, 1)[:, None]).view(inputs.shape)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).tanh().square().flatten(1).sum(1)

    model = Folding()
    problem = Problem(model, loss, torch.randn(4, 3, 6))
    expected = _plain(problem)
    engine = PerSampleGradients(model, projection_dim="full", reuse_products=True)
    _passes(engine, problem, 2)
    model.fold = True
    problem.model.zero_grad()
    try:
        with engine:
            loss(model, problem.batch).mean().backward()
    except CaptureError:
        pass  # the rows may be lost, the training not
    _same(model, expected)


def test_a_checked_pass_has_no_more_layers_reused_than_any_other() -> None:
    """A check forms every product; that of a wide convolution is not formed again, and left to autograd."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 128, 3), nn.Conv2d(128, 128, 3), nn.Conv2d(128, 3, 3))
    images = torch.randn(4, 3, 9, 9)
    problem = Problem(model, lambda model, batch: model(batch).square().flatten(1).sum(1), images)
    engine = PerSampleGradients(model, projection_dim=256, reuse_products=True)
    _passes(engine, problem)
    assert engine._reuse is not None
    assert sorted(engine._reuse.chosen) == ["0", "2"]
