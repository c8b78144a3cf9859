"""Backward passes of another kind cost the pass they are in, and nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from diffhook.errors import CaptureError
from diffhook.gradients import PerSampleGradients
from tests.gradients.passes import BATCH, WIDTH, alone, passes, sample_losses


class _Unruled(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:  # another one, so that the rule of its class is not used
        return super().forward(input)


@pytest.mark.parametrize("first", [True, False], ids=["first-pass", "later-pass"])
@pytest.mark.parametrize("bare", [False, True], ids=["ruled", "fallback"])
def test_a_gradient_penalty_costs_the_pass_and_nothing_else(first: bool, bare: bool) -> None:
    torch.manual_seed(0)
    kind = _Unruled if bare else nn.Conv2d
    model = nn.Sequential(kind(2, 4, 3), nn.Tanh(), kind(4, 1, 3))
    twin = copy.deepcopy(model)
    engine = PerSampleGradients(model, projection_dim="full")
    assert bool(engine.coverage.fallback) is bare

    def penalised(model: nn.Module, batch: Tensor) -> Tensor:
        batch = batch.clone().requires_grad_()
        losses = sample_losses(model, (batch,))
        (slope,) = torch.autograd.grad(losses.sum(), batch, create_graph=True)
        return (losses + slope.square().flatten(1).sum(1)).mean()

    plain = (torch.randn(BATCH, 2, 6, 6),)
    if not first:
        assert passes(engine, [plain], alone) == 0
    for each in (model, twin):
        each.zero_grad()
    penalised(twin, plain[0]).backward()
    with pytest.raises(CaptureError, match="create_graph") as raised, engine:
        penalised(model, plain[0]).backward()
    assert raised.value.kind == "double backward"
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=0)
    assert passes(engine, [plain, plain], alone) == 0


def test_a_backward_of_the_loops_own_before_the_real_one_costs_the_pass() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
    engine = PerSampleGradients(model)
    batch = torch.randn(BATCH, WIDTH, requires_grad=True)
    engine.begin()
    engine.attach()
    losses = sample_losses(model, (batch,))
    torch.autograd.grad(losses.sum(), batch, retain_graph=True)
    losses.mean().backward()
    with pytest.raises(CaptureError) as raised:
        engine.finish()
    engine.detach()
    assert raised.value.kind == "double backward"
