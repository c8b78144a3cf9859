"""Adapters of peft, whose weights are functions of parameters alone, are followed exactly."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from diffhook.gradients import PerSampleGradients
from tests.twins import relative_error, sample_gradients

_LINEAR = ["first", "second"]
_BOTH = ["conv", "first", "second"]

ADAPTERS: dict[str, Any] = {
    "lora": peft.LoraConfig(r=2, target_modules=_BOTH),
    "dora": peft.LoraConfig(r=2, target_modules=_LINEAR, use_dora=True),
    "loha": peft.LoHaConfig(r=2, target_modules=_BOTH),
    "loha-effective-conv": peft.LoHaConfig(r=2, target_modules=_BOTH, use_effective_conv2d=True),
    "lokr": peft.LoKrConfig(r=2, target_modules=_BOTH),
    "oft": peft.OFTConfig(oft_block_size=4, target_modules=_LINEAR, use_cayley_neumann=False),
    "oft-neumann": peft.OFTConfig(oft_block_size=4, target_modules=_LINEAR, use_cayley_neumann=True),
    "boft": peft.BOFTConfig(boft_block_size=4, target_modules=_LINEAR),
    "fourierft": peft.FourierFTConfig(n_frequency=8, target_modules=_LINEAR),
    "vera": peft.VeraConfig(r=2, target_modules=_LINEAR),
    "ia3": peft.IA3Config(target_modules=_LINEAR, feedforward_modules=[]),
}


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 3, padding=1)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.conv(x).flatten(2).transpose(1, 2).tanh()
        return self.second(self.first(tokens).tanh())


def _losses(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
    return model(batch[0]).tanh().square().flatten(1).sum(1)


@pytest.mark.parametrize("weight_gradients", [True, False], ids=["in-step", "probe"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_equals_the_batch_1_loop(name: str, weight_gradients: bool) -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(_Net(), ADAPTERS[name])
    for parameter in model.parameters():  # adapters start out with zeros, and others without a gradient
        if parameter.requires_grad:
            with torch.no_grad():
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.double()  # what FourierFT computes in float32 is itself off by 1e-5
    engine = PerSampleGradients(model, projection_dim="full", weight_gradients=weight_gradients)
    for _ in range(3):
        batch = (torch.randn(4, 2, 5, 5, dtype=torch.float64),)
        expected = sample_gradients(model, _losses, batch)
        with engine:
            _losses(model, batch).mean().backward()
        assert engine.coverage.complete, engine.coverage
        assert relative_error(engine.projections, expected) < 1e-9
