"""Layers that are called in the pass that is checked, and left out later while their weights are used."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from diffhook.errors import RecheckNeeded
from diffhook.gradients import PerSampleGradients
from tests.twins import sample_gradients


class Either(nn.Module):
    """Calls its layer, uses its weights in another way, or skips it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(3, 3), nn.Linear(3, 1)
        self.way = "called"

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "called":
            x = self.layer(x).tanh()
        elif self.way == "used":
            x = functional.linear(x, 2 * self.layer.weight).tanh()
        return self.last(x)


def _losses(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
    return model(batch[0]).square().mean(1)


def _check_rows(engine: PerSampleGradients, model: nn.Module) -> None:
    batch = (torch.randn(4, 3),)
    with engine:
        _losses(model, batch).mean().backward()
    expected = sample_gradients(model, _losses, batch).norm(dim=1)
    torch.testing.assert_close(engine.norms.double(), expected, rtol=1e-5, atol=0)


def test_weights_of_a_layer_that_is_left_out_are_noticed_at_once_and_followed_from_then_on() -> None:
    torch.manual_seed(0)
    model, rechecks = Either(), 0
    engine = PerSampleGradients(model, projection_dim=0)
    for way in ("called", "called", "used", "used", "skipped", "called", "used", "skipped", "called"):
        model.way = way
        try:
            _check_rows(engine, model)
        except RecheckNeeded:
            rechecks += 1
    assert rechecks == 1


def test_a_layer_that_is_left_out_alone_needs_no_new_check() -> None:
    model = Either()
    engine = PerSampleGradients(model, projection_dim=0)
    for way in ("called", "skipped", "called", "skipped"):
        model.way = way
        _check_rows(engine, model)


def test_passes_without_weight_gradients_leave_out_what_is_never_called() -> None:
    model = Either()
    model.way = "skipped"
    engine = PerSampleGradients(model, projection_dim=0, weight_gradients=False)
    for _ in range(3):
        _check_rows(engine, model)


@pytest.mark.parametrize("way", ["used", "skipped"])
def test_passes_without_weight_gradients_check_again_where_a_layer_is_called_no_more(way: str) -> None:
    """Its weights may be used in another way, of which a frozen weight tells nothing."""
    model = Either()
    engine = PerSampleGradients(model, projection_dim=0, weight_gradients=False)
    _check_rows(engine, model)
    model.way = way
    with pytest.raises(RecheckNeeded, match="layer was not called, as it was when coverage was checked"):
        _check_rows(engine, model)
    for _ in range(2):
        _check_rows(engine, model)


@pytest.mark.parametrize("way", ["called", "skipped"])
def test_nothing_is_left_on_the_parameters(way: str) -> None:
    model = Either()
    engine = PerSampleGradients(model, projection_dim=0)
    for now in ("called", way):
        model.way = now
        _check_rows(engine, model)
    assert not any(parameter._backward_hooks for parameter in model.parameters())
