"""Rows on a grid of timesteps and noise, against autograd a sample at a time."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import diffhook
from diffhook.capture import measure
from diffhook.capture.grid import take, to_device
from diffhook.capture.noise import noise_bank
from diffhook.errors import ConfigurationError
from diffhook.gradients import PerSampleGradients
from tests.runs import SCHEDULER, TinyDenoiser, denoising_losses
from tests.twins import sample_gradients

OBJECTIVE = diffhook.DiffusionObjective(SCHEDULER)
IMAGES = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def gradient(model: TinyDenoiser, sample: int, timestep: int, seeds: list[int]) -> Tensor:
    """(P,) float64, the mean over the seeds."""
    clean = IMAGES[sample].expand(len(seeds), -1, -1, -1)
    noise = noise_bank(torch.tensor(seeds), clean)
    times = torch.full((len(seeds),), timestep)
    return sample_gradients(model, denoising_losses, (clean, noise, times)).mean(0)


def rows_of(grid: diffhook.Grid, **options: Any) -> tuple[TinyDenoiser, dict[str, np.ndarray]]:
    torch.manual_seed(0)
    model = TinyDenoiser()
    engine = PerSampleGradients(model, projection_dim="full", weight_gradients=False, group_size=grid.draws)
    parts = list(
        measure(engine, OBJECTIVE, (IMAGES,), [5, 6, 7], grid, step=4, lr=0.5, weight=1.0, **options)
    )
    return model, {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_every_replicate_is_a_row_of_its_own_noise(batch_size: int) -> None:
    grid = diffhook.Grid([5, 900], draws=2, first_seed=3, replicates=3)
    model, rows = rows_of(grid, batch_size=batch_size)
    assert len(rows["sample"]) == 3 * grid.rows == 3 * 2 * 3
    assert sorted(set(rows["noise_seed"])) == [3, 5, 7]
    seen = set()
    for i in range(len(rows["sample"])):
        sample, t, seed = int(rows["sample"][i]), int(rows["timestep"][i]), int(rows["noise_seed"][i])
        seen.add((sample, t, seed))
        expected = gradient(model, sample - 5, t, [seed, seed + 1])
        norm = float(expected.norm())
        np.testing.assert_allclose(rows["grad_norm"][i], norm, rtol=1e-5)
        np.testing.assert_allclose(rows["projection"][i], expected / norm, atol=1e-5)
    assert len(seen) == len(rows["sample"])


def test_weights_of_a_samples_rows_add_up() -> None:
    _, rows = rows_of(diffhook.Grid(3, draws=2, replicates=4))
    for sample in (5, 6, 7):
        assert rows["weight"][rows["sample"] == sample].sum() == pytest.approx(1)


def test_the_mean_over_replicates_is_the_mean_over_all_draws() -> None:
    """So that TracIn does not change with the way draws are grouped."""
    _, split = rows_of(diffhook.Grid([300], draws=2, replicates=3))
    _, whole = rows_of(diffhook.Grid([300], draws=6))
    for sample in (5, 6, 7):
        mine = split["sample"] == sample
        mean = (split["projection"][mine] * split["grad_norm"][mine, None]).mean(0)
        other = whole["sample"] == sample
        expected = (whole["projection"][other] * whole["grad_norm"][other, None])[0]
        np.testing.assert_allclose(mean, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "options", [{"timesteps": 0}, {"timesteps": []}, {"draws": 0}, {"replicates": 0}], ids=str
)
def test_an_empty_grid_is_an_error(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="expected at least 1 × 1 × 1"):
        diffhook.Grid(**options)


def test_a_timestep_outside_the_schedule_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match=r"\[5, 1000\] are not all within \[0, 1000\)"):
        diffhook.Grid([5, 1000]).steps(1000)


def test_a_mapping_is_taken_apart_like_a_dict() -> None:
    """Tokenisers give batches that are no dicts."""
    batch = {"images": IMAGES, "extra": {"numbers": torch.arange(3)}}
    wrapped = UserDict(images=IMAGES, extra=UserDict(numbers=torch.arange(3)))
    index = torch.tensor([2, 2, 0])
    assert isinstance(take(wrapped, index), UserDict)
    assert torch.equal(take(wrapped, index)["images"], IMAGES[index])
    assert torch.equal(take(wrapped, index)["extra"]["numbers"], index)
    assert to_device(wrapped, torch.device("meta"))["extra"]["numbers"].is_meta
    engine = PerSampleGradients(TinyDenoiser(), projection_dim=0, weight_gradients=False)
    rows = [
        list(measure(engine, OBJECTIVE, given, [5, 6, 7], diffhook.Grid(2), step=4, lr=0.5, weight=1.0))
        for given in (batch, wrapped)
    ]
    np.testing.assert_array_equal(rows[0][0]["grad_norm"], rows[1][0]["grad_norm"])


def test_probes_spread_over_a_dataset_of_any_size() -> None:
    for size in (1, 7, 512, 100_000_000, 2**40):
        ids = diffhook.Probe(512).ids(size)
        assert len(set(ids)) == min(size, 512)
        assert (ids[0], ids[-1]) == (0, size - 1)
