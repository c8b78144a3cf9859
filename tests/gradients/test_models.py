"""Whole diffusion models against the batch-size-1 loop."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffhook.gradients import PerSampleGradients
from tests.models import PROBLEMS, Problem
from tests.twins import projected, relative_error, rows, sample_gradients

Make = Callable[..., Problem]

models = pytest.mark.parametrize("make", PROBLEMS.values(), ids=PROBLEMS)


def _run(problem: Problem, **options: object) -> PerSampleGradients:
    """The engine after an ordinary pass, which the checked first one makes way for."""
    engine = PerSampleGradients(problem.model, **options)  # type: ignore[arg-type]
    for _ in range(2):
        problem.model.zero_grad()
        with engine:
            problem.loss(problem.model, problem.batch).mean().backward()
    return engine


def _check(problem: Problem, expected: Tensor | None = None, **options: object) -> None:
    if expected is None:
        expected = sample_gradients(problem.model, problem.loss, problem.batch)
    engine = PerSampleGradients(problem.model, projection_dim="full", **options)  # type: ignore[arg-type]
    for _ in range(2):  # the first is checked
        with engine:
            problem.loss(problem.model, problem.batch).mean().backward()
        assert engine.coverage.complete
        assert relative_error(engine.norms[:, None], expected.norm(dim=1, keepdim=True)) < 1e-5
        assert relative_error(engine.projections, expected) < 1e-5


@models
@pytest.mark.parametrize("weight_gradients", [True, False], ids=["in-step", "probe"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_gradients_equal_the_batch_1_loop(
    make: Make, memory_format: torch.memory_format, weight_gradients: bool
) -> None:
    problem = make()
    problem.model.to(memory_format=memory_format)
    _check(problem, weight_gradients=weight_gradients)


@models
@pytest.mark.parametrize("weight_gradients", [True, False], ids=["in-step", "probe"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["modern", "reentrant"])
def test_gradient_checkpointing_changes_nothing(make: Make, reentrant: bool, weight_gradients: bool) -> None:
    problem = make()
    expected = sample_gradients(problem.model, problem.loss, problem.batch)
    inputs, _ = problem.batch
    if reentrant:  # its blocks are differentiated only if their input needs a gradient
        for value in inputs.values():
            if value.is_floating_point():
                value.requires_grad_()

    def checkpoint(function: Callable, *args: object) -> object:
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=reentrant)

    problem.model.enable_gradient_checkpointing(checkpoint)  # type: ignore[operator]
    _check(problem, expected, weight_gradients=weight_gradients)


@models
def test_projections_equal_the_projected_batch_1_loop(make: Make) -> None:
    problem = make()
    engine = _run(problem, projection_dim=512, seed=3)
    gradients = sample_gradients(problem.model, problem.loss, problem.batch)
    expected = projected(engine.sketch, problem.model, gradients)
    assert relative_error(engine.projections, expected) < 1e-5


@models
def test_a_batch_may_be_split_anywhere(make: Make) -> None:
    problem = make(batch=5)
    whole = _run(problem)
    parts = [_run(problem._replace(batch=rows(problem.batch, part))) for part in (slice(0, 1), slice(1, 5))]
    assert relative_error(torch.cat([p.projections for p in parts]), whole.projections) < 1e-5
    assert relative_error(torch.cat([p.norms for p in parts])[:, None], whole.norms[:, None]) < 1e-5


@models
def test_parameter_gradients_are_bit_identical_with_the_engine(make: Make) -> None:
    problem = make()
    gradients = []
    engine = PerSampleGradients(problem.model)
    for watch in (nullcontext(), engine, engine):  # the first watched pass is checked
        problem.model.zero_grad()
        with watch:
            problem.loss(problem.model, problem.batch).mean().backward()
        gradients.append([p.grad.clone() for p in problem.model.parameters() if p.requires_grad])
    for other in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], other, strict=True))


@models
def test_probes_leave_grad_and_requires_grad_alone(make: Make) -> None:
    problem = make()
    before = {n: p.requires_grad for n, p in problem.model.named_parameters()}
    marks = {}
    for name, parameter in problem.model.named_parameters():
        if parameter.requires_grad:
            parameter.grad = marks[name] = torch.full_like(parameter, 7)
    engine = PerSampleGradients(problem.model, weight_gradients=False)
    for _ in range(2):
        with engine:
            problem.loss(problem.model, problem.batch).mean().backward()
    assert {n: p.requires_grad for n, p in problem.model.named_parameters()} == before
    for name, parameter in problem.model.named_parameters():
        assert parameter.grad is marks.get(name)
        assert parameter.grad is None or bool((parameter.grad == 7).all())


@models
@pytest.mark.parametrize("group_size", [2, 4])
def test_a_group_of_rows_is_one_sample_with_the_mean_loss(make: Make, group_size: int) -> None:
    problem = make()
    gradients = sample_gradients(problem.model, problem.loss, problem.batch)
    expected = gradients.view(-1, group_size, gradients.shape[1]).mean(1)
    engine = _run(problem, projection_dim="full", group_size=group_size, weight_gradients=False)
    assert relative_error(engine.projections, expected) < 1e-5


def test_two_models_that_one_backward_reaches_make_one_gradient() -> None:
    class Both(nn.Module):
        """The same two models as a whole, for the twin."""

        def __init__(self, encoder: nn.Module, denoiser: nn.Module) -> None:
            super().__init__()
            self.encoder, self.denoiser = encoder, denoiser

    denoiser, denoising_loss, (inputs, target) = PROBLEMS["conditional_unet"]()
    torch.manual_seed(1)
    encoder = nn.Sequential(nn.Embedding(11, 24), nn.LayerNorm(24), nn.Linear(24, 24))

    def loss(model: nn.Module, batch: Any) -> Tensor:
        words, (inputs, target) = batch
        encoder, denoiser = model.children()
        return denoising_loss(denoiser, ({**inputs, "encoder_hidden_states": encoder(words)}, target))

    batch = (torch.randint(0, 11, (len(target), 5)), (inputs, target))
    engine = PerSampleGradients(
        nn.ModuleDict({"encoder": encoder, "denoiser": denoiser}), projection_dim="full"
    )
    for _ in range(2):
        with engine:
            loss(engine.model, batch).mean().backward()
    assert engine.coverage.complete
    expected = sample_gradients(Both(encoder, denoiser), loss, batch)
    assert relative_error(engine.projections, expected) < 1e-5


@pytest.mark.parametrize("name", PROBLEMS)
def test_rows_do_not_depend_on_how_the_batch_is_split(name: str) -> None:
    model, loss, batch = PROBLEMS[name](batch=6)
    engine = PerSampleGradients(model, projection_dim=512, weight_gradients=False)
    parts = []
    for part in (slice(0, 6), slice(0, 1), slice(1, 3), slice(3, 6)):
        with engine:
            loss(model, rows(batch, part)).mean().backward()
        parts.append(torch.cat([engine.projections, engine.norms[:, None]], 1))
    assert relative_error(torch.cat(parts[1:]), parts[0]) < 1e-5


def test_inputs_are_let_go_of_as_the_backward_passes_their_layers() -> None:
    class Packed:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    packed: list[weakref.ref[Packed]] = []

    def pack(tensor: Tensor) -> Packed:
        held = Packed(tensor)
        packed.append(weakref.ref(held))
        return held

    layers = [nn.Linear(8, 8) for _ in range(6)]
    alive: list[int] = []
    engine = PerSampleGradients(nn.Sequential(*layers), projection_dim=16, weight_gradients=False)
    for _ in range(2):  # the second pass does without the survey
        packed.clear()
        with engine, torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
            inputs = torch.randn(4, 3, 8, requires_grad=True)
            inputs.register_hook(lambda _: alive.append(sum(held() is not None for held in packed)))
            engine.model(inputs).square().mean((1, 2)).mean().backward()
    assert len(packed) > len(layers), "nothing was kept, so nothing was tested"
    assert alive[-1] <= 2


class _Nested(nn.Module):
    """A layer that happens to have the name of a wrapper's."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(3, 3, bias=False)
        self.weight = nn.Parameter(torch.ones(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x) + x @ self.weight


def test_a_layer_called_module_is_no_wrapper() -> None:
    model, batch = _Nested(), (torch.randn(4, 3),)

    def losses(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
        return model(*batch).square().mean(1)

    engine = PerSampleGradients(model, projection_dim=0)
    assert list(engine.parameters) == ["weight", "module.weight"]
    with engine:
        losses(model, batch).mean().backward()
    expected = sample_gradients(model, losses, batch).norm(dim=1)
    torch.testing.assert_close(engine.norms, expected.float(), rtol=1e-5, atol=0)
    wrapped = PerSampleGradients(nn.DataParallel(model), projection_dim=0)
    assert list(wrapped.parameters) == ["weight", "module.weight"]


def test_what_a_hook_of_others_makes_of_an_output_is_not_taken_for_the_layers() -> None:
    problem = PROBLEMS["unet"]()
    layer = next(m for m in problem.model.modules() if isinstance(m, nn.Conv2d))
    layer.register_forward_hook(lambda module, args, output: 2 * output)
    _check(problem)


def test_between_passes_no_layer_has_a_hook() -> None:
    problem = PROBLEMS["unet"]()
    engine = PerSampleGradients(problem.model, projection_dim=0, reuse_products=True)
    engine.attach()
    for _ in range(2):
        assert not any(
            m._forward_hooks or m._forward_pre_hooks
            for m in problem.model.modules()
            if m is not problem.model
        )
        engine.begin()
        problem.loss(problem.model, problem.batch).mean().backward()
        engine.finish()
    engine.begin()
    problem.loss(problem.model, problem.batch)
    engine.detach()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in problem.model.modules())
    assert all(p.requires_grad for p in problem.model.parameters())
