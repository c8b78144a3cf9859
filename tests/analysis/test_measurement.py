"""Another scalar than the loss, for D-TRAK and DAS."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import diffhook
from diffhook.errors import ConfigurationError


class Prediction(NamedTuple):
    output: Tensor


class Doubling:
    """Predicts by the model alone."""

    num_timesteps = 10

    def predict(self, model: nn.Module, batch: Any, timesteps: Tensor, noise_seeds: Tensor) -> Prediction:
        return Prediction(model(batch + timesteps[:, None] + noise_seeds[:, None]))

    def __call__(self, *arguments: Any) -> Tensor:
        raise AssertionError("the loss is not what is measured")

    def describe(self) -> dict[str, Any]:
        return {"kind": "doubling"}


@pytest.mark.parametrize(
    ("measurement", "expected"),
    [("squared-output", lambda out: (out**2).mean(1)), ("mean-output", lambda out: out.mean(1))],
)
def test_the_measurement_is_taken_of_the_models_output(measurement: str, expected: Any) -> None:
    model, batch = nn.Linear(3, 5), torch.randn(4, 3)
    timesteps, seeds = torch.arange(4), torch.tensor([7, 7, 8, 8])
    measured = diffhook.Measured(Doubling(), measurement)
    found = measured(model, batch, timesteps, seeds)
    torch.testing.assert_close(found, expected(model(batch + (timesteps + seeds)[:, None])))
    found.sum().backward()
    assert model.weight.grad is not None
    assert measured.describe() == {"kind": "doubling", "measurement": measurement}
    assert measured.num_timesteps == 10
    assert measured.schedule([1, 5]) == [1, 5]


def test_an_unknown_measurement_names_those_there_are() -> None:
    with pytest.raises(ConfigurationError, match="expected squared-output or mean-output"):
        diffhook.Measured(Doubling(), "output")
