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
from diffhook.capture.objective.noise import noise_bank, noise_seed
from diffhook.capture.probes.grid import take, to_device
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
@pytest.mark.parametrize("own_noise", [False, True], ids=["shared", "own"])
def test_every_replicate_is_a_row_of_its_own_noise(batch_size: int, own_noise: bool) -> None:
    grid = diffhook.Grid([5, 900], draws=2, seed=3, replicates=3)
    model, rows = rows_of(grid, batch_size=batch_size, own_noise=own_noise)
    assert len(rows["sample"]) == 3 * grid.rows == 3 * 2 * 3
    assert (rows["own_noise"] == own_noise).all()
    seen = set()
    for i in range(len(rows["sample"])):
        sample, t, r = int(rows["sample"][i]), int(rows["timestep"][i]), int(rows["replicate"][i])
        seen.add((sample, t, r))
        seeds = [noise_seed(3, t, 2 * r + m, sample if own_noise else None) for m in (0, 1)]
        assert rows["noise_seed"][i] == seeds[0]
        expected = gradient(model, sample - 5, t, seeds)
        norm = float(expected.norm())
        np.testing.assert_allclose(rows["grad_norm"][i], norm, rtol=1e-5)
        np.testing.assert_allclose(rows["projection"][i], expected / norm, atol=1e-5)
    assert len(seen) == len(rows["sample"])


def test_no_two_timesteps_draws_or_samples_have_the_same_noise() -> None:
    seeds = [
        noise_seed(grid, t, draw, sample)
        for grid in (0, 1)
        for t in (1, 112.0, 999)
        for draw in range(4)
        for sample in (None, 0, 1, 2**62)
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    first = noise_bank(torch.tensor(seeds), torch.zeros(len(seeds), 8)).unique(dim=0)
    assert len(first) == len(seeds)


def test_the_noise_of_a_draw_is_the_same_for_every_process_and_version() -> None:
    """Probes of a resumed run and queries asked years later must agree on it."""
    assert noise_seed(0, 1, 0) == noise_seed(0, 1.0, 0) == 8574871580638872243
    assert noise_seed(7, 999, 3, 12) == 881466279815250304


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
    # The engine measures which algorithm is fastest, and may round otherwise the second time.
    np.testing.assert_allclose(rows[0][0]["grad_norm"], rows[1][0]["grad_norm"], rtol=1e-5)


def test_probes_spread_over_a_dataset_of_any_size() -> None:
    for size in (1, 7, 512, 100_000_000, 2**40):
        ids = diffhook.Probe(512).ids(size)
        assert len(set(ids)) == min(size, 512)
        assert (ids[0], ids[-1]) == (0, size - 1)
