"""Checkpoints of a repository's own: an autograd function that lets go of its inputs in its backward, which
computes the block again and asks autograd for the parameters' gradients. ADM's, LDM's and what came of them
have it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffhook.errors import RecheckNeeded
from diffhook.gradients import PerSampleGradients
from tests.twins import relative_error

BATCH, WIDTH = 4, 6


class _Checkpoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Callable[..., Tensor], x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.run, ctx.x, ctx.parameters = run, x, parameters
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x = ctx.x.detach().requires_grad_()
        with torch.enable_grad():
            output = ctx.run(x.view_as(x))
        found = torch.autograd.grad(output, (x, *ctx.parameters), gradients[0], allow_unused=True)
        del ctx.run, ctx.x, ctx.parameters
        return (None, *found)


class _Half(torch.autograd.Function):
    """Uses a layer's weight and calls no layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.own = x, weight
        return x @ weight.T / 2

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight = ctx.own
        del ctx.own
        return gradients[0] @ weight / 2, gradients[0].T @ x / 2


class _Scaled(nn.Linear):
    """No layer that a rule explains."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class _Block(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = _Checkpoint.apply(self.layers, x, *self.layers.parameters())
        return x + found


class _Model(nn.Module):
    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        found: Tensor = self.last(x)
        return found


class _Used(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = _Half.apply(x, self.layer.weight)
        return x + found


MODELS: dict[str, Callable[[], list[nn.Module]]] = {
    "layers": lambda: [_Block(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.LayerNorm(WIDTH)) for _ in range(2)],
    "no layers": lambda: [_Block(_Scaled(WIDTH, WIDTH), nn.Tanh())],
    "both": lambda: [_Block(_Scaled(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)) for _ in range(2)],
    "in a chain": lambda: [nn.Sequential(_Block(nn.Linear(WIDTH, WIDTH)), _Block(_Scaled(WIDTH, WIDTH)))],
    "between layers": lambda: [
        _Block(_Scaled(WIDTH, WIDTH)),
        nn.Linear(WIDTH, WIDTH),
        _Block(_Scaled(WIDTH, WIDTH)),
    ],
    "weights": lambda: [_Used(), _Used()],
}


def _loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean(1).mean()


@pytest.mark.parametrize("name", MODELS)
def test_rows_are_the_batch_1_loops_and_the_training_goes_on_as_without_us(name: str) -> None:
    torch.manual_seed(0)
    model = _Model(MODELS[name]())
    engine = PerSampleGradients(model, projection_dim="full")
    rechecks = 0
    for _ in range(6):
        x = torch.randn(BATCH, WIDTH)
        gradients = []
        for watch in (nullcontext(), engine):
            model.zero_grad()
            try:
                with watch:
                    _loss(model, x).backward()
            except RecheckNeeded:
                rechecks += 1
            gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
        if rechecks and _ == 0:
            continue
        for row, sample in zip(engine.projections, x, strict=True):
            model.zero_grad()
            _loss(model, sample[None]).backward()
            own = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
            assert relative_error(row[None], own[None]) < 1e-5
    assert engine.coverage.complete, engine.coverage
    assert rechecks == (name == "weights")  # its layers are called by nobody, which the first pass finds
