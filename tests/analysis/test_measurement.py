"""Another scalar than the loss, for D-TRAK and DAS."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diffhook
from diffhook.capture.objective import Predicting, Prediction
from diffhook.errors import ConfigurationError
from tests.runs import SCHEDULER, TinyDenoiser, train


class Doubling(Predicting):
    """Predicts by the model alone."""

    num_timesteps = 10

    def predict(self, model: nn.Module, batch: Any, timesteps: Tensor, noise_seeds: Tensor) -> Prediction:
        output = model(batch + timesteps[:, None] + noise_seeds[:, None])
        return Prediction(output, torch.zeros_like(output), torch.ones(len(output)))

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


def test_d_trak_from_training_to_scores(tmp_path: Path) -> None:
    objective, grid = diffhook.DiffusionObjective(SCHEDULER), diffhook.Grid(2, replicates=2)
    run = train(tmp_path / "log", projection_dim=64, epochs=1)
    log = diffhook.open_log(tmp_path / "log")
    measured = diffhook.Measured(objective, "squared-output")
    for name, images in (("samples", run.data), ("asked", run.data[:2] + 0.1)):
        diffhook.query(log, images, name, measured, model=TinyDenoiser(), grid=grid)
    scores = diffhook.influence(log, "asked", "d-trak", "samples")
    assert scores.values.shape == (2, 12)
    assert scores.errors is not None
    assert scores.top(1).sample_ids[:, 0].tolist() == [0, 1], "a sample's own neighbour must come first"
    with pytest.raises(ConfigurationError, match="queries 'asked' holds those of the squared-output"):
        diffhook.influence(log, "asked", "tracin")
