"""A group norm over two values: what float32 loses there, autograd loses too, one sample at a time."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from diffhook.gradients import PerSampleGradients
from tests.twins import double, rows, sample_gradients

Batch = tuple[Tensor, Tensor]


def _model() -> nn.Module:
    """The deepest level of a UNet with 64 channels on images of 64 × 64: maps of 1 × 1, 32 groups."""
    torch.manual_seed(0)
    blocks = [layer for _ in range(6) for layer in (nn.GroupNorm(32, 64), nn.SiLU(), nn.Conv2d(64, 64, 1))]
    return nn.Sequential(nn.Conv2d(4, 64, 1), *blocks, nn.Conv2d(64, 4, 1))


def _losses(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch[0]) - batch[1]).square().flatten(1).mean(1)


def _norms(model: nn.Module, batch: Batch) -> Tensor:
    engine = PerSampleGradients(model, projection_dim=0)
    with engine:
        _losses(model, batch).mean().backward()
    return engine.norms.double()


def _alone(model: nn.Module, batch: Batch) -> Tensor:
    """By autograd, in the model's precision."""
    found = []
    for sample in range(len(batch[0])):
        losses = _losses(model, rows(batch, slice(sample, sample + 1)))
        shares = torch.autograd.grad(losses.sum(), list(model.parameters()))
        found.append(torch.cat([share.flatten().double() for share in shares]).norm())
    return torch.stack(found)


def test_norms_over_groups_of_two_values_are_exact_to_the_networks_own_rounding() -> None:
    model, batch = _model(), (torch.randn(4, 4, 1, 1), torch.randn(4, 4, 1, 1))
    exact = sample_gradients(model, _losses, batch).norm(dim=1)
    torch.testing.assert_close(_norms(copy.deepcopy(model).double(), double(batch)), exact, rtol=1e-6, atol=0)
    alone = _alone(model, batch)
    assert ((alone - exact).abs() / exact).max() > 1e-4, "float32 is enough here, and the case shows nothing"
    torch.testing.assert_close(_norms(model, batch), alone, rtol=1e-5, atol=0)
