"""Per-sample gradients on a GPU are those of a batch-1 loop there, and projections those of a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from diffhook.gradients import PerSampleGradients
from tests.devices import DEVICE
from tests.models import PROBLEMS, Problem
from tests.twins import double, relative_error, rows, sample_gradients

pytestmark = pytest.mark.gpu

models = pytest.mark.parametrize("make", PROBLEMS.values(), ids=PROBLEMS)
Make = Callable[[], Problem]


def _placed(problem: Problem, device: str, convert: Callable[[Any], Any] = lambda value: value) -> Problem:
    batch = convert(tree_map_only(Tensor, lambda tensor: tensor.to(device), problem.batch))
    return problem._replace(model=convert(problem.model.to(device)), batch=batch)


def _passed(problem: Problem, **options: Any) -> PerSampleGradients:
    """After two passes: the first is checked."""
    engine = PerSampleGradients(problem.model, **options)
    for _ in range(2):
        with engine:
            problem.loss(problem.model, problem.batch).mean().backward()
    return engine


@models
@pytest.mark.parametrize("weight_gradients", [True, False], ids=["in-step", "probe"])
def test_gradients_equal_the_batch_1_loop(make: Make, weight_gradients: bool) -> None:
    problem = _placed(make(), DEVICE)
    expected = sample_gradients(problem.model, problem.loss, problem.batch)
    engine = _passed(problem, projection_dim="full", weight_gradients=weight_gradients)
    assert engine.coverage.complete
    assert relative_error(engine.norms[:, None], expected.norm(dim=1, keepdim=True)) < 1e-5
    assert relative_error(engine.projections, expected) < 1e-5


@models
def test_projections_are_those_of_a_cpu(make: Make) -> None:
    found = {}
    for device in ("cpu", DEVICE):
        problem = _placed(make(), device, lambda v: v.double() if hasattr(v, "parameters") else double(v))
        found[device] = _passed(problem, projection_dim=512).projections.cpu()
    assert relative_error(found[DEVICE], found["cpu"]) < 1e-5


@models
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_under_autocast_norms_are_those_of_a_batch_1_loop_under_it(make: Make, dtype: torch.dtype) -> None:
    problem = _placed(make(), DEVICE)

    def losses(batch: Any) -> Tensor:
        with torch.autocast(DEVICE, dtype):
            return problem.loss(problem.model, batch).float()

    scale = 2.0**10  # as a scaler's: gradients of float16 are small
    trained = [p for p in problem.model.parameters() if p.requires_grad]
    count = len(losses(problem.batch))
    alone = [losses(rows(problem.batch, slice(i, i + 1))).sum() * scale for i in range(count)]
    shares = [torch.autograd.grad(loss, trained, materialize_grads=True) for loss in alone]
    expected = torch.stack([torch.cat([g.flatten().double() for g in s]).norm() / scale for s in shares])
    engine = PerSampleGradients(problem.model, projection_dim=0)
    engine.loss_scale = scale
    for _ in range(2):
        with engine:
            (losses(problem.batch).mean() * scale).backward()
    assert relative_error(engine.norms[:, None], expected[:, None]) < 0.02
