"""Norms and projections over chosen modules are those of the rest left out; training is as without us."""

from __future__ import annotations

import copy

import pytest
import torch

from diffhook.errors import ConfigurationError
from diffhook.gradients import PerSampleGradients
from tests.models import PROBLEMS, unet
from tests.twins import relative_error, sample_gradients

CHOICES = {
    "one": ("conv_in", lambda name: name.startswith("conv_in.")),
    "pattern": ("*.conv1", lambda name: ".conv1." in name),
    "several": (["mid_block", "*.norm2"], lambda name: name.startswith("mid_block.") or ".norm2." in name),
    "parameter": ("*.bias", lambda name: name.endswith(".bias")),
}


@pytest.mark.parametrize("weight_gradients", [True, False], ids=["in-step", "probe"])
@pytest.mark.parametrize("choice", CHOICES)
def test_norms_and_gradients_are_those_of_the_chosen_modules(choice: str, weight_gradients: bool) -> None:
    model, loss, batch = unet()
    layers, counts = CHOICES[choice]
    names = [name for name, _ in model.named_parameters() if counts(name)]
    assert 0 < len(names) < len(list(model.parameters()))
    twin = copy.deepcopy(model)
    loss(twin, batch).mean().backward()
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_(counts(name))
    expected = sample_gradients(twin, loss, batch)
    engine = PerSampleGradients(
        model, layers=layers, projection_dim="full", weight_gradients=weight_gradients
    )
    for _ in range(2):  # the first is checked
        model.zero_grad()
        with engine:
            loss(model, batch).mean().backward()
        assert list(engine.parameters) == names
        assert engine.coverage.complete
        assert relative_error(engine.projections, expected) < 1e-5
        assert relative_error(engine.norms[:, None], expected.norm(dim=1, keepdim=True)) < 1e-5
        for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
            assert parameter.requires_grad
            if weight_gradients:
                assert torch.equal(parameter.grad, other.grad)  # type: ignore[arg-type]
            else:
                assert parameter.grad is None


@pytest.mark.parametrize("name", PROBLEMS)
def test_projections_of_all_modules_by_name_are_those_of_the_model(name: str) -> None:
    model, loss, batch = PROBLEMS[name]()
    found = []
    for layers in (None, "*"):
        engine = PerSampleGradients(model, layers=layers, projection_dim=256)
        with engine:
            loss(model, batch).mean().backward()
        found.append(engine.projections)
    assert relative_error(*found) < 1e-5


def test_a_name_that_matches_nothing_is_refused() -> None:
    with pytest.raises(
        ConfigurationError, match=r"'\*\.attn7', which matches no trained module; there are conv_in"
    ):
        PerSampleGradients(unet().model, layers=["conv_in", "*.attn7"])
    with pytest.raises(ConfigurationError, match="matches no trained module"):
        PerSampleGradients(unet().model, layers="conv_i")
