"""Layers that another module runs than the one they belong to."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffhook.errors import CaptureError
from diffhook.gradients import PerSampleGradients
from tests.gradients.passes import BATCH, WIDTH, sample_losses
from tests.twins import relative_error


class _LoRA(nn.Module):
    """Trained beside a frozen layer, whose forward it takes over (own wording of a common pattern)."""

    def __init__(self, host: nn.Linear) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)
        original = host.forward
        host.forward = lambda x: original(x) + self.up(self.down(x))  # type: ignore[method-assign]


def test_adapters_that_a_frozen_host_runs_are_captured_by_passing_its_calls_in() -> None:
    torch.manual_seed(0)
    host = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)).requires_grad_(False)
    adapters = nn.ModuleList([_LoRA(host[0]), _LoRA(host[2])])
    engine = PerSampleGradients(adapters, projection_dim="full")
    engine.attach()
    for _ in range(3):
        batch = torch.randn(BATCH, 4, WIDTH)
        parameters = list(adapters.parameters())
        rows = [
            torch.autograd.grad(loss, parameters) for loss in (sample_losses(host, (x[None],)) for x in batch)
        ]
        expected = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
        engine.begin()
        engine.enter_model(host, (batch,))
        output = host(batch)
        engine.leave_model(host, (batch,), output)
        output.tanh().square().flatten(1).sum(1).mean().backward()
        engine.finish()
        assert engine.coverage.complete
        assert relative_error(engine.projections, expected) < 1e-5
    engine.detach()


def test_layers_that_are_called_outside_of_the_model_say_what_to_do() -> None:
    host = nn.Sequential(nn.Linear(WIDTH, WIDTH)).requires_grad_(False)
    adapters = nn.ModuleList([_LoRA(host[0])])
    engine = PerSampleGradients(adapters)
    with pytest.raises(CaptureError, match="enter_model") as raised, engine:
        sample_losses(host, (torch.randn(BATCH, WIDTH),)).mean().backward()
    assert raised.value.kind == "outside"
