"""A user's model, taken for measurements, is afterwards what it was."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diffhook.capture.model.borrowing import unengaged
from diffhook.gradients import PerSampleGradients


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)
        self.two.weight = self.one.weight
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Any:
        return self.two(self.one(x).tanh()) * self.scale


class DeepSpeedEngine(nn.Module):
    """Takes every gradient of its parameters, as the real one does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.taken: list[Tensor] = []
        for parameter in module.parameters():
            parameter.register_post_accumulate_grad_hook(self.taken.append)

    def forward(self, x: Tensor) -> Any:
        return self.module(x)


DeepSpeedEngine.__module__ = "deepspeed.runtime.engine"


def test_an_engine_hears_of_no_pass_of_ours() -> None:
    engine = DeepSpeedEngine(Tied())
    own, x = dict(engine.named_parameters(remove_duplicate=False)), torch.randn(2, 3)
    with unengaged(engine) as model:
        assert model.two.weight is model.one.weight is not own["module.one.weight"]
        gradients = PerSampleGradients(model, projection_dim="full", weight_gradients=False)
        with gradients:
            model(x).square().mean().backward()
        assert torch.equal(model.scale, own["module.scale"])
        own["module.scale"].data.mul_(2)
        assert torch.equal(model.scale, own["module.scale"]), "it is the same memory"
    assert len(gradients.norms) == 2
    assert not engine.taken
    again = dict(engine.named_parameters(remove_duplicate=False))
    assert all(again[name] is parameter for name, parameter in own.items())
    engine(x).sum().backward()
    assert len(engine.taken) == len({id(parameter) for parameter in own.values()})


def test_a_model_without_an_engine_is_left_as_it_is() -> None:
    model = Tied()
    own = list(model.parameters())
    with unengaged(model) as same:
        assert same is model
        assert all(a is b for a, b in zip(model.parameters(), own, strict=True))
