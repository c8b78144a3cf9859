"""Two plain lines know the training loss: what was recognised stands in the log, and queries take it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, EulerDiscreteScheduler, SchedulerMixin
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import diffhook
from diffhook.capture.objective.noise import noise_bank
from diffhook.cli.info import describe
from diffhook.integrations.accelerate import DiffHook
from tests.models import unet
from tests.runs import SCHEDULER, TinyDenoiser, denoising_losses

IMAGES = torch.randn(48, 1, 16, 16, generator=torch.Generator().manual_seed(0))
Loss = Callable[[nn.Module, Tensor], Tensor]
GRID = diffhook.Grid(3, replicates=2)


def plain(model: nn.Module, clean: Tensor) -> Tensor:
    noise, timesteps = torch.randn_like(clean), torch.randint(0, 1000, (len(clean),))
    return denoising_losses(model, (clean, noise, timesteps)).mean()


def min_snr_velocity(model: nn.Module, clean: Tensor) -> Tensor:
    noise, timesteps = torch.randn_like(clean), torch.randint(0, 1000, (len(clean),))
    target = SCHEDULER.get_velocity(clean, noise, timesteps)
    predicted = model(SCHEDULER.add_noise(clean, noise, timesteps), timesteps)[0]
    kept = SCHEDULER.alphas_cumprod[timesteps]
    snr = kept / (1 - kept)
    errors = F.mse_loss(predicted, target, reduction="none").flatten(1).mean(1)
    return (errors * snr.clamp(max=5) / (snr + 1)).mean()


def mixed_by_hand(model: nn.Module, clean: Tensor) -> Tensor:
    noise, sigmas = torch.randn_like(clean), torch.rand(len(clean))
    share = sigmas.view(-1, 1, 1, 1)
    predicted = model((1 - share) * clean + share * noise, sigmas * 1000)[0]
    return F.mse_loss(predicted, noise - clean)


SAMPLER = EulerDiscreteScheduler.from_config(SCHEDULER.config)


def _denoised(model: nn.Module, clean: Tensor, scale: float = 1.0) -> Tensor:
    """As EDM's loops: a sampler mixes x + σ ε, the model is given it at unit variance, the loss is of x."""
    noise, timesteps = torch.randn_like(clean), torch.randint(0, 1000, (len(clean),)).float()
    kept = SCHEDULER.alphas_cumprod[timesteps.long()].view(-1, 1, 1, 1)
    sigmas = ((1 - kept) / kept).sqrt()
    mixed = SAMPLER.add_noise(clean, noise, timesteps)
    predicted = model(mixed / (sigmas**2 + 1).sqrt() * scale, timesteps)[0]
    return (sigmas**-2 * (mixed - sigmas * predicted - clean) ** 2).flatten(1).mean(1).mean()


def sampler_mixed(model: nn.Module, clean: Tensor) -> Tensor:
    return _denoised(model, clean)


def sampler_mixed_odd(model: nn.Module, clean: Tensor) -> Tensor:
    return _denoised(model, clean, 0.9)


def odd(model: nn.Module, clean: Tensor) -> Tensor:
    noise, timesteps = torch.randn_like(clean), torch.randint(0, 1000, (len(clean),))
    predicted = model(SCHEDULER.add_noise(clean, noise, timesteps), timesteps)[0]
    return (predicted - noise.sin()).square().mean()


def train(
    log: Path | None, loss: Loss, model: nn.Module | None = None, epochs: int = 2, **options: Any
) -> nn.Module:
    torch.manual_seed(0)
    model = TinyDenoiser() if model is None else model
    accelerator = Accelerator(cpu=True)
    if log is not None:
        DiffHook(accelerator, log, strict=True, alerts=(), **{"projection_dim": 64, **options})
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    loader = DataLoader(TensorDataset(IMAGES), 8, shuffle=True)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for _ in range(epochs):
        for (clean,) in loader:
            accelerator.backward(loss(prepared, clean))
            optimizer.step()
            optimizer.zero_grad()
    accelerator.end_training()
    return model


@pytest.mark.parametrize(
    ("loss", "kind", "weighting"),
    [
        (plain, "epsilon", {"kind": "uniform"}),
        (min_snr_velocity, "v_prediction", {"kind": "min_snr", "gamma": 5.0}),
        (mixed_by_hand, "flow_prediction", {"kind": "uniform"}),
        (sampler_mixed, "epsilon", {"kind": "uniform"}),
    ],
)
def test_the_log_knows_the_loss(loss: Loss, kind: str, weighting: dict[str, Any], tmp_path: Path) -> None:
    train(tmp_path / "log", loss)
    found = diffhook.open_log(tmp_path / "log").objective
    assert found is not None
    assert (found["prediction_type"], found["weighting"]) == (kind, weighting)
    if kind != "flow_prediction":
        config = dict(SCHEDULER.config)
        if loss is sampler_mixed:  # of sampling alone
            config["timestep_spacing"] = SAMPLER.config["timestep_spacing"]
        assert {name: config[name] for name in found["scheduler_config"]} == found["scheduler_config"]


def test_what_a_sampler_mixed_is_probed_as_the_loop_trains_it(tmp_path: Path) -> None:
    """x + σ ε, divided by √(σ² + 1), is DDPM's mixture; σ⁻² on the sample's error leaves the noise's."""
    model = train(tmp_path / "log", sampler_mixed, probe=diffhook.Probe(None, diffhook.Grid(2)))
    table = diffhook.open_log(tmp_path / "log").probe
    for row in range(len(table["sample"]) - 6, len(table["sample"])):
        twin = copy.deepcopy(model).double()
        clean = IMAGES[int(table["sample"][row])][None].double()
        noise = noise_bank(torch.tensor([int(table["noise_seed"][row])]), clean.float()).double()
        timesteps = torch.tensor([int(table["timestep"][row])])
        kept = SCHEDULER.alphas_cumprod.double()[timesteps].view(-1, 1, 1, 1)
        sigma = ((1 - kept) / kept).sqrt()
        predicted = twin((clean + sigma * noise) / (sigma**2 + 1).sqrt(), timesteps)[0]
        (sigma**-2 * (clean + sigma * noise - sigma * predicted - clean) ** 2).mean().backward()
        norm = torch.cat([p.grad.flatten() for p in twin.parameters() if p.grad is not None]).norm()
        assert table["grad_norm"][row] == pytest.approx(float(norm), rel=2e-5)


def test_a_samplers_mixture_at_another_scale_is_not_known(tmp_path: Path) -> None:
    train(tmp_path / "log", sampler_mixed_odd)
    log = diffhook.open_log(tmp_path / "log")
    assert log.objective is None
    assert "in shares that are not" in log.objective_words


def test_queries_need_not_be_told_it(tmp_path: Path) -> None:
    model = train(tmp_path / "log", min_snr_velocity, unet().model)
    log = diffhook.open_log(tmp_path / "log")
    grid = diffhook.Grid(2)
    told = diffhook.DiffusionObjective(
        SCHEDULER, prediction_type="v_prediction", weighting=diffhook.MinSNR(5.0)
    )
    by_log = diffhook.query(log, IMAGES[:3], "by-log", grid=grid, model=model)
    by_hand = diffhook.query(log, IMAGES[:3], "by-hand", told, grid=grid, model=model)
    for column in ("grad_norm", "projection", "loss"):
        np.testing.assert_array_equal(by_log[column], by_hand[column])


def test_a_run_that_was_too_short_says_so_and_a_resumed_one_keeps_what_was_recognised(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "log", plain, epochs=1)
    told = "too few of the captured rows showed it, 48, and 64 of two batches are needed"
    assert f"training loss not recognised: {told}" in capsys.readouterr().out
    log = diffhook.open_log(tmp_path / "log")
    assert told in log.objective_words
    assert "objective=DiffusionObjective(noise_scheduler" in log.objective_words
    assert describe(log)["training loss"] == log.objective_words
    train(tmp_path / "other", plain)
    train(tmp_path / "other", plain, epochs=1)
    assert diffhook.open_log(tmp_path / "other").objective is not None


def penalised(model: nn.Module, clean: Tensor) -> Tensor:
    """Cannot be split by sample, so that every micro-batch is left out."""
    noise, timesteps = torch.randn_like(clean), torch.randint(0, 1000, (len(clean),))
    noisy = SCHEDULER.add_noise(clean, noise, timesteps).requires_grad_()
    predicted = model(noisy, timesteps)[0]
    (slope,) = torch.autograd.grad(predicted.sum(), noisy, create_graph=True)
    return F.mse_loss(predicted, noise) + slope.square().mean()


def wrapped(model: nn.Module, clean: Tensor) -> Tensor:
    noise, timesteps = torch.randn_like(clean), torch.randint(0, 1000, (len(clean),))
    return F.mse_loss(model(SCHEDULER.add_noise(clean, noise, timesteps), timesteps)["x"], noise)


class Wrapped(TinyDenoiser):
    """Answers with a dictionary."""

    def forward(self, *given: Any, **named: Any) -> Any:
        return {"x": super().forward(*given, **named)[0]}


@pytest.mark.parametrize(
    ("loss", "rows", "told"),
    [
        (penalised, 0, "no micro-batch has made rows that could show it"),
        (wrapped, 48, "none of the captured rows showed it"),
    ],
)
def test_a_run_that_showed_nothing_is_not_told_to_capture_more(
    loss: Loss, rows: int, told: str, tmp_path: Path
) -> None:
    model = Wrapped() if loss is wrapped else TinyDenoiser()
    train(tmp_path / "log", loss, model, epochs=1, every=1)
    log = diffhook.open_log(tmp_path / "log")
    assert len(log.train) == rows
    assert told in log.objective_words
    assert "every=1" not in log.objective_words


def test_more_steps_are_advised_where_some_were_not_captured(tmp_path: Path) -> None:
    for every in (1, 2):
        train(tmp_path / str(every), plain, epochs=1, every=every)
    one, two = (diffhook.open_log(tmp_path / name).objective_words for name in ("1", "2"))
    assert "or capture more steps (every=1)" in two
    assert "train longer" in one
    assert "every=1" not in one


def test_what_is_not_recognised_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "log", odd)
    log = diffhook.open_log(tmp_path / "log")
    assert log.objective is None
    told = "that of no known error of ε-, v-, sample- or flow-prediction"
    assert told in log.objective_words
    assert told in capsys.readouterr().out


def test_a_wrong_objective_that_is_given_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    given = diffhook.DiffusionObjective(DDPMScheduler(beta_schedule="squaredcos_cap_v2"))
    probe = diffhook.Probe(2, diffhook.Grid(1))
    with caplog.at_level(logging.WARNING, "diffhook"):
        train(tmp_path / "log", min_snr_velocity, objective=given, probe=probe)
    (told,) = [r.getMessage() for r in caplog.records if "objective that was given" in r.getMessage()]
    kind = "prediction type epsilon (the training's: v_prediction)"
    for part in (kind, "weighting uniform", "noise schedule"):
        assert part in told


def test_a_right_objective_is_not_spoken_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    probe = diffhook.Probe(2, diffhook.Grid(1))
    with caplog.at_level(logging.WARNING, "diffhook"):
        train(tmp_path / "log", plain, objective=diffhook.DiffusionObjective(SCHEDULER), probe=probe)
    assert "objective" not in caplog.text


@pytest.mark.parametrize("loss", [plain, odd])
def test_training_is_the_same_and_schedulers_are_left_alone(loss: Loss, tmp_path: Path) -> None:
    before = {kind: dict(vars(kind)) for kind in SchedulerMixin.__subclasses__()}
    watched, alone = train(tmp_path / "log", loss), train(None, loss)
    for ours, theirs in zip(watched.parameters(), alone.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert all(dict(vars(kind)) == held for kind, held in before.items())


class Points(nn.Module):
    """Of samples that are no images: (B, F)."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.time, self.inward, self.outward = (
            nn.Linear(1, 8),
            nn.Linear(features, 8),
            nn.Linear(8, features),
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.outward(F.silu(self.inward(x) + self.time(t[:, None].to(x.dtype) / 1000)))


@pytest.mark.parametrize("features", [1, 2, 40])
def test_samples_of_two_axes_are_probed_like_others(features: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    points, model = torch.rand(64, features), Points(features)
    accelerator = Accelerator(cpu=True)
    DiffHook(accelerator, tmp_path / "log", every=1, strict=True, probe=diffhook.Probe(None, GRID))
    loader = DataLoader(TensorDataset(points), 16, shuffle=True)
    optimizer: Any = torch.optim.Adam(model.parameters(), 1e-3)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for _ in range(2):
        for (clean,) in loader:
            noise, timesteps = torch.randn_like(clean), torch.randint(0, 1000, (len(clean),))
            predicted = prepared(SCHEDULER.add_noise(clean, noise, timesteps), timesteps)
            accelerator.backward(F.mse_loss(predicted, noise))
            optimizer.step()
            optimizer.zero_grad()
    accelerator.end_training()
    log = diffhook.open_log(tmp_path / "log")
    assert log.objective is not None, log.objective_words
    table = log.probe
    assert set(table["sample"]) == set(range(64))
    for row in range(0, len(table), 40):
        clean, timestep = points[table["sample"][row]][None], torch.tensor([int(table["timestep"][row])])
        noise = noise_bank(torch.tensor([int(table["noise_seed"][row])]), clean).double()
        twin = copy.deepcopy(model).double()
        twin_loss = twin(SCHEDULER.add_noise(clean.double(), noise, timestep), timestep) - noise
        twin_loss.square().mean().backward()
        expected = torch.cat([p.grad.flatten() for p in twin.parameters() if p.grad is not None]).norm()
        assert table["grad_norm"][row] == pytest.approx(float(expected), rel=2e-5)


# ── probes by what was recognised ─────────────────────────────────────────────────────────────────


class Encoder(nn.Module):
    """Stands in for an autoencoder: latents are not in the batch, and differ from its images."""

    def forward(self, images: Tensor) -> Tensor:
        return 0.5 * images.flip(-1) + 0.1


def encoded(model: nn.Module, clean: Tensor) -> Tensor:
    with torch.no_grad():
        latents = Encoder()(clean)
    return min_snr_velocity(model, latents)


def test_probes_need_no_objective_and_see_what_the_training_saw(tmp_path: Path) -> None:
    """The same rows as by hand, of latents that only the loop makes."""
    options: dict[str, Any] = {"projection_dim": "full", "snapshot_every": 12}
    train(tmp_path / "plain", encoded, probe=diffhook.Probe(None, GRID, label_timesteps=0), **options)

    def inputs(batch: Any) -> tuple[Tensor, dict[str, Any]]:
        return Encoder()(batch[0]), {}

    told = diffhook.DiffusionObjective(
        SCHEDULER, inputs, prediction_type="v_prediction", weighting=diffhook.MinSNR(5.0)
    )
    by_hand = diffhook.Probe(None, GRID, label_timesteps=0)
    train(tmp_path / "by-hand", encoded, probe=by_hand, objective=told, **options)
    found, expected = (diffhook.open_log(tmp_path / name).probe for name in ("plain", "by-hand"))
    assert len(found) == len(expected) == 48 * 3 * 2
    keys = ("step", "sample", "timestep", "replicate")
    orders = [np.lexsort([table[key] for key in keys]) for table in (found, expected)]
    for column in (*keys, "noise_seed", "lr", "weight"):
        np.testing.assert_allclose(found[column][orders[0]], expected[column][orders[1]], rtol=1e-5)
    np.testing.assert_allclose(found["grad_norm"][orders[0]], expected["grad_norm"][orders[1]], rtol=1e-5)
    cosines = (found["projection"][orders[0]] * expected["projection"][orders[1]]).sum(1)
    np.testing.assert_allclose(cosines, 1, atol=1e-5)


def test_a_share_of_the_samples_is_drawn_evenly_and_alike_in_every_run(tmp_path: Path) -> None:
    for name in ("one", "two"):
        train(tmp_path / name, plain, probe=diffhook.Probe(16, GRID))
    one, two = (np.unique(diffhook.open_log(tmp_path / name).probe["sample"]) for name in ("one", "two"))
    assert one.tolist() == two.tolist()
    assert 8 <= len(one) <= 24
    assert len(np.unique(one // 16)) == 3


def test_probes_of_what_is_not_recognised_are_none(tmp_path: Path) -> None:
    train(tmp_path / "log", odd, probe=diffhook.Probe(None, GRID))
    log = diffhook.open_log(tmp_path / "log")
    assert (len(log.train), len(log.probe)) == (96, 0)


def test_probed_training_is_the_same(tmp_path: Path) -> None:
    watched = train(tmp_path / "log", plain, probe=diffhook.Probe(None, GRID), snapshot_every=5)
    for ours, theirs in zip(watched.parameters(), train(None, plain).parameters(), strict=True):
        assert torch.equal(ours, theirs)
