"""Passes beside what a slow loop says of them, and of plain training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from diffhook.errors import RecheckNeeded
from diffhook.gradients import PerSampleGradients
from tests.twins import double, relative_error

Layers = Callable[[], nn.Module]

BATCH, WIDTH = 5, 6


def sample_losses(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    return model(*batch).tanh().square().flatten(1).sum(1)


def passes(engine: PerSampleGradients, batches: list[tuple[Tensor, ...]], expected: Any) -> int:
    """Passes that were left out; every other is exact, and all train as they would without the engine."""
    twin = copy.deepcopy(engine.model)
    left_out = 0
    for batch in batches:
        for each in (engine.model, twin):
            each.zero_grad()
        exact = expected(copy.deepcopy(twin), batch)  # which may move running statistics
        sample_losses(twin, batch).mean().backward()
        try:
            with engine:
                sample_losses(engine.model, batch).mean().backward()
        except RecheckNeeded:
            left_out += 1
        else:
            assert engine.coverage.complete, engine.coverage
            assert relative_error(engine.projections, exact) < 1e-5
            assert relative_error(engine.norms[:, None], exact.norm(dim=1, keepdim=True)) < 1e-5
        for one, other in zip(engine.model.parameters(), twin.parameters(), strict=True):
            assert (one.grad is None) == (other.grad is None)
            assert one.grad is None or torch.equal(one.grad, other.grad)  # type: ignore[arg-type]
        for one, other in zip(engine.model.buffers(), twin.buffers(), strict=True):
            assert torch.equal(one, other)
    return left_out


def alone(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """(B, P) float64, one sample at a time; in place, as a copy's patched forward runs the original."""
    parameters = [p for p in model.double().parameters() if p.requires_grad]
    rows = []
    for sample in range(len(batch[0])):
        loss = sample_losses(model, tuple(v[sample : sample + 1] for v in double(batch)))
        shares = torch.autograd.grad(loss.sum(), parameters, materialize_grads=True)
        rows.append(torch.cat([share.flatten() for share in shares]))
    model.float()
    return torch.stack(rows)


def within_batch(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """(B, P) float64: the gradient of each sample's own loss, computed within the batch."""
    twin = copy.deepcopy(model).double()
    losses = sample_losses(twin, double(batch))
    rows = [torch.autograd.grad(loss, list(twin.parameters()), retain_graph=True) for loss in losses]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
