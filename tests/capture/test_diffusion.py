"""The training loss from a scheduler, against the formulas written out sample by sample."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.training_utils import compute_loss_weighting_for_sd3, compute_snr
from torch import Tensor, nn

import diffhook
from diffhook.capture import MinSNR
from diffhook.capture.objective.noise import noise_bank
from diffhook.capture.objective.parametrization import PARAMETRIZATIONS, Parametrization
from diffhook.capture.objective.schedulers import make_scheduler
from diffhook.errors import ConfigurationError
from diffhook.log.schema import json_like

DDPM = DDPMScheduler()
SHIFTED = FlowMatchEulerDiscreteScheduler(shift=3.0)
CLEAN = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
SEEDS = torch.tensor([7, 8, 7, 9])


class Recording(nn.Module):
    """Says a third of what it is given, and remembers the call."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1 / 3, dtype=torch.float64))
        self.told: Any = None

    def forward(self, sample: Tensor, timestep: Tensor, **conditions: Any) -> tuple[Tensor]:
        self.told = (timestep, conditions)
        return (sample * self.scale,)


def direct(
    mix: Callable[[float], tuple[float, float]],
    target: Callable[[float, Tensor, Tensor], Tensor],
    weight: Callable[[float], float],
    timesteps: Tensor,
) -> Tensor:
    """(B,) losses, a sample at a time: x_t = a x + s ε."""
    losses = []
    for clean, seed, t in zip(CLEAN, SEEDS, timesteps.tolist(), strict=True):
        noise = noise_bank(seed[None], clean[None])[0]
        a, s = mix(t)
        error = (a * clean + s * noise) / 3 - target(t, clean, noise)
        losses.append(weight(t) * error.square().mean())
    return torch.stack(losses)


def kept(t: float) -> float:
    """ᾱ_t of the linear schedule, from its betas."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    return float(torch.cumprod(1 - betas, 0)[int(t)])


def variance_preserving(t: float) -> tuple[float, float]:
    return math.sqrt(kept(t)), math.sqrt(1 - kept(t))


def velocity(t: float, clean: Tensor, noise: Tensor) -> Tensor:
    a, s = variance_preserving(t)
    return a * noise - s * clean


def snr(t: float) -> float:
    return kept(t) / (1 - kept(t))


TARGETS = {
    "epsilon": lambda t, clean, noise: noise,
    "v_prediction": velocity,
    "sample": lambda t, clean, noise: clean,
}
MIN_SNR = {
    "epsilon": lambda t: min(snr(t), 5) / snr(t),
    "v_prediction": lambda t: min(snr(t), 5) / (snr(t) + 1),
    "sample": lambda t: min(snr(t), 5),
}


@pytest.mark.parametrize("kind", list(TARGETS))
@pytest.mark.parametrize("weighting", [None, MinSNR(5.0), "snr"], ids=["uniform", "min-SNR", "SNR"])
@pytest.mark.parametrize("scheduler", [DDPMScheduler, DDIMScheduler])
def test_losses_equal_the_formula(kind: str, weighting: Any, scheduler: Any) -> None:
    objective = diffhook.DiffusionObjective(scheduler(prediction_type=kind), weighting=weighting)
    timesteps = torch.tensor([0, 50, 400, 999])
    weight = {None: lambda t: 1.0, "snr": snr}.get(weighting, MIN_SNR[kind])
    expected = direct(variance_preserving, TARGETS[kind], weight, timesteps)
    # Schedulers keep ᾱ in float32, which leaves 1 − ᾱ few digits at the first timestep.
    torch.testing.assert_close(objective(Recording(), CLEAN, timesteps, SEEDS), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("weighting", [None, "sigma_sqrt", "cosmap"])
def test_flow_losses_equal_the_formula(weighting: str | None) -> None:
    objective = diffhook.DiffusionObjective(SHIFTED, weighting=weighting)
    timesteps = torch.tensor([3.0, 250.5, 700.0, 1000.0])
    weight = {
        None: lambda t: 1.0,
        "sigma_sqrt": lambda t: (t / 1000) ** -2,
        "cosmap": lambda t: 2 / (math.pi * (1 - 2 * t / 1000 + 2 * (t / 1000) ** 2)),
    }[weighting]
    expected = direct(
        lambda t: (1 - t / 1000, t / 1000), lambda t, clean, noise: noise - clean, weight, timesteps
    )
    model = Recording()
    torch.testing.assert_close(objective(model, CLEAN, timesteps, SEEDS), expected, rtol=1e-6, atol=0)
    assert torch.equal(model.told[0], timesteps)


def test_flow_noise_and_weights_are_those_of_diffusers() -> None:
    objective = diffhook.DiffusionObjective(SHIFTED)
    timesteps = SHIFTED.timesteps[torch.tensor([0, 100, 500, 999])]
    noise = noise_bank(SEEDS, CLEAN.float())
    ours = objective.parametrization.noisy(CLEAN.float(), noise, timesteps)
    torch.testing.assert_close(ours, SHIFTED.scale_noise(CLEAN.float(), timesteps, noise))
    for scheme in ("sigma_sqrt", "cosmap"):
        weighted = diffhook.DiffusionObjective(SHIFTED, weighting=scheme)
        theirs = compute_loss_weighting_for_sd3(scheme, timesteps / 1000)
        torch.testing.assert_close(weighted.weighting(timesteps, weighted.parametrization), theirs)


def test_signal_to_noise_is_that_of_diffusers() -> None:
    timesteps = torch.arange(1000)
    ours = diffhook.DiffusionObjective(DDPM).parametrization.snr(timesteps)
    torch.testing.assert_close(ours, compute_snr(DDPM, timesteps), rtol=1e-4, atol=0)


def implied_sample(kind: Parametrization, said: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
    """What the prediction says of the clean sample."""
    if kind.name == "flow_prediction":
        return noisy - t / 1000 * said
    if kind.name == "flow_to_sample":
        return noisy + (1000 - t) / 1000 * said
    a, s = variance_preserving(float(t))
    return {"epsilon": (noisy - s * said) / a, "v_prediction": a * noisy - s * said, "sample": said}[
        kind.name
    ]


@pytest.mark.parametrize("name", list(PARAMETRIZATIONS))
def test_min_snr_weighs_the_error_of_the_sample_alike_for_every_prediction(name: str) -> None:
    scheduler = SHIFTED if name.startswith("flow") else DDPM
    objective = diffhook.DiffusionObjective(scheduler, prediction_type=name, weighting=MinSNR(5.0))
    kind = objective.parametrization
    for t in torch.tensor([20, 300, 700]):
        times = t[None]
        noise = noise_bank(SEEDS[:1], CLEAN[:1])
        noisy, target = (f(CLEAN[:1], noise, times) for f in (kind.noisy, kind.target))
        wrong = target + 0.1
        error = (implied_sample(kind, wrong, noisy, t) - CLEAN[:1]).square().mean()
        share = float(t) / 1000 if name == "flow_prediction" else 1 - float(t) / 1000
        ratio = snr(float(t)) if scheduler is DDPM else ((1 - share) / share) ** 2
        expected = min(ratio, 5) * error
        found = objective.weighting(times, kind) * (wrong - target).square().mean()
        torch.testing.assert_close(found, expected[None], rtol=1e-3, atol=0, check_dtype=False)


def test_min_snr_is_finite_where_the_last_step_is_pure_noise() -> None:
    scheduler = DDPMScheduler(rescale_betas_zero_snr=True)
    for kind in TARGETS:
        objective = diffhook.DiffusionObjective(scheduler, prediction_type=kind, weighting=MinSNR())
        assert torch.isfinite(objective(Recording(), CLEAN, torch.full((4,), 999), SEEDS)).all()


def test_a_flow_to_the_sample_is_the_other_one_in_reverse() -> None:
    forth, back = (
        diffhook.DiffusionObjective(SHIFTED, prediction_type=kind, weighting="sigma_sqrt")
        for kind in ("flow_prediction", "flow_to_sample")
    )
    timesteps = torch.tensor(forth.schedule([0, 10, 500, 999]), dtype=torch.float64)
    assert back.schedule([999, 989, 499, 0]) == pytest.approx((1000 - timesteps).tolist())
    noise = noise_bank(SEEDS, CLEAN)
    one, other = forth.parametrization, back.parametrization
    noisy = one.noisy(CLEAN, noise, timesteps)
    torch.testing.assert_close(other.noisy(CLEAN, noise, 1000 - timesteps), noisy)
    said = one.target(CLEAN, noise, timesteps)
    assert torch.equal(other.target(CLEAN, noise, 1000 - timesteps), -said)
    torch.testing.assert_close(other.clean(noisy, -said, 1000 - timesteps), CLEAN)
    torch.testing.assert_close(
        back.weighting(1000 - timesteps, other), forth.weighting(timesteps, one), rtol=1e-4, atol=0
    )


def test_a_flow_grid_follows_the_resolution_shift() -> None:
    """The training draws positions of the schedule evenly, so the grid must."""
    steps = diffhook.Grid(4).timesteps_of(diffhook.DiffusionObjective(SHIFTED))
    sigmas = [(position + 1) / 1000 for position in (1, 334, 666, 999)]
    expected = [1000 * 3 * sigma / (1 + 2 * sigma) for sigma in sigmas]
    assert steps == pytest.approx(expected, rel=1e-5)
    sampler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    sampler.set_timesteps(7)  # a validation run in between
    assert diffhook.Grid(4).timesteps_of(diffhook.DiffusionObjective(sampler)) == steps
    assert diffhook.Grid([10, 20.5]).timesteps_of(diffhook.DiffusionObjective(SHIFTED)) == [10, 20.5]
    assert diffhook.Grid(3).timesteps_of(diffhook.DiffusionObjective(DDPM)) == [1, 500, 999]


def test_the_model_is_told_a_scaled_timestep() -> None:
    model, timesteps = Recording(), torch.tensor([100, 200, 300, 400])
    objective = diffhook.DiffusionObjective(SHIFTED, timestep_scale=1 / 1000)
    plain = diffhook.DiffusionObjective(SHIFTED)(Recording(), CLEAN, timesteps, SEEDS)
    assert torch.equal(objective(model, CLEAN, timesteps, SEEDS), plain)
    torch.testing.assert_close(model.told[0], timesteps / 1000)


def test_noise_offset_adds_one_draw_per_channel() -> None:
    plain, offset = noise_bank(SEEDS, CLEAN), noise_bank(SEEDS, CLEAN, offset=0.1)
    added = (offset - plain) / 0.1
    torch.testing.assert_close(added, added[:, :, :1, :1].expand_as(added), rtol=0, atol=1e-5)
    assert added[:, :, 0, 0].unique().numel() == 2 * 3, "a constant for each channel of each of three seeds"
    assert torch.equal(offset[0], offset[2])
    objective = diffhook.DiffusionObjective(DDPM, noise_offset=0.1)
    prediction = objective.predict(Recording(), CLEAN, torch.full((4,), 500), SEEDS)
    torch.testing.assert_close(prediction.target, offset)


def test_predict_gives_what_the_loss_is_made_of() -> None:
    objective = diffhook.DiffusionObjective(DDPM, weighting=lambda timesteps: timesteps / 500)
    timesteps = torch.tensor([0, 250, 500, 750])
    prediction = objective.predict(Recording(), CLEAN, timesteps, SEEDS)
    assert prediction.output.requires_grad
    assert not prediction.target.requires_grad
    torch.testing.assert_close(prediction.weights, torch.tensor([0, 0.5, 1, 1.5], dtype=torch.float64))
    losses = (prediction.output - prediction.target).square().mean((1, 2, 3)) * prediction.weights
    torch.testing.assert_close(objective(Recording(), CLEAN, timesteps, SEEDS), losses)


def test_a_half_precision_models_loss_is_formed_in_float32() -> None:
    model = Recording().bfloat16()
    timesteps = torch.full((4,), 500)
    losses = diffhook.DiffusionObjective(DDPM)(model, CLEAN.bfloat16(), timesteps, SEEDS)
    assert losses.dtype == torch.float32


CONDITIONS = {
    "encoder_hidden_states": torch.ones(4, 5, 6),
    "added_cond_kwargs": {"time_ids": torch.ones(4, 6)},
}


@pytest.mark.parametrize(
    ("batch", "conditions"),
    [
        (CLEAN, {}),
        ((CLEAN, torch.arange(4)), {}),
        ([CLEAN, CONDITIONS], CONDITIONS),
        ({"latents": CLEAN, "caption": ["a"] * 4, **CONDITIONS}, CONDITIONS),
        ({"images": CLEAN, "class_labels": torch.arange(4)}, {"class_labels": torch.arange(4)}),
    ],
    ids=["tensor", "tuple", "tuple and conditions", "dict", "class labels"],
)
def test_conditions_reach_the_model(batch: Any, conditions: dict[str, Any]) -> None:
    model = Recording()
    diffhook.DiffusionObjective(DDPM)(model, batch, torch.full((4,), 5), SEEDS)
    assert model.told[1].keys() == conditions.keys()
    for name, value in conditions.items():
        torch.testing.assert_close(model.told[1][name], value)


@pytest.mark.parametrize(
    ("scheduler", "options"),
    [
        (DDPMScheduler(beta_schedule="scaled_linear"), {}),
        (DDIMScheduler(prediction_type="v_prediction"), {"weighting": MinSNR(3.0), "noise_offset": 0.05}),
        (SHIFTED, {"weighting": "cosmap", "timestep_scale": 1 / 1000}),
        (SHIFTED, {"prediction_type": "flow_to_sample", "weighting": "sigma_sqrt"}),
    ],
)
def test_the_description_brings_the_objective_back(scheduler: Any, options: dict[str, Any]) -> None:
    objective = diffhook.DiffusionObjective(scheduler, **options)
    described = json.loads(json.dumps(objective.describe()))
    again = diffhook.DiffusionObjective.from_description(described)
    assert again.describe() == objective.describe()
    timesteps = torch.tensor([1, 100, 400, 900])
    args = (CLEAN, timesteps, SEEDS)
    assert torch.equal(again(Recording(), *args), objective(Recording(), *args))


class Dumb(nn.Module):
    def forward(self, sample: Tensor, timestep: Tensor) -> str:
        return "noise"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: diffhook.DiffusionObjective(DDPM, prediction_type="x0"), "is 'x0'; expected one of epsilon"),
        (lambda: diffhook.DiffusionObjective(SHIFTED, prediction_type="epsilon"), "has no add_noise"),
        (lambda: diffhook.DiffusionObjective(DDPM, prediction_type="flow_prediction"), "has no scale_noise"),
        (lambda: diffhook.DiffusionObjective(DDPM, weighting="p3"), "is 'p3'; expected one of uniform"),
        (lambda: MinSNR(0), "gamma is 0; expected a positive"),
        (
            lambda: diffhook.DiffusionObjective.from_description(
                diffhook.DiffusionObjective(DDPM, weighting=lambda t: t).describe()
            ),
            r"weighting of the user's own \(.*lambda",
        ),
        (
            lambda: diffhook.DiffusionObjective.from_description({"kind": "mine"}),
            "of kind 'mine', which cannot be rebuilt",
        ),
        (
            lambda: diffhook.DiffusionObjective(DDPM)(Dumb(), CLEAN, torch.zeros(4).long(), SEEDS),
            "returned a str; expected a tensor",
        ),
        (
            lambda: diffhook.DiffusionObjective(DDPM)(Dumb(), {"x": CLEAN}, torch.zeros(4).long(), SEEDS),
            r"keys \['x'\], none of latents, images",
        ),
        (lambda: make_scheduler("AmusedScheduler", {}), "diffusers cannot make a AmusedScheduler: "),
        (
            lambda: diffhook.DiffusionObjective(DDPM)(Dumb(), "images", torch.zeros(4).long(), SEEDS),
            "batch of type str",
        ),
    ],
)
def test_bad_use_says_what_was_expected(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_a_schedule_given_as_an_array_survives_the_log() -> None:
    betas = np.linspace(1e-4, 0.02, 100)
    objective = diffhook.DiffusionObjective(DDPMScheduler(100, trained_betas=betas))
    described = json.loads(json.dumps(json_like(objective.describe())))
    again = diffhook.DiffusionObjective.from_description(described)
    assert again.describe() == described
    torch.testing.assert_close(again.scheduler.alphas_cumprod, objective.scheduler.alphas_cumprod)


@pytest.mark.parametrize(
    "kind",
    [EulerDiscreteScheduler, HeunDiscreteScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler],
)
@pytest.mark.parametrize("prediction_type", [None, "sample"])
def test_a_scheduler_that_mixes_otherwise_than_the_training_is_refused(
    kind: Any, prediction_type: str | None
) -> None:
    clean, noise = torch.ones(1, 1), -torch.ones(1, 1)
    mixed = float(kind().add_noise(clean, noise, torch.tensor([900])))
    kept = float(DDPM.alphas_cumprod[900])
    assert abs(mixed - (kept**0.5 - (1 - kept) ** 0.5)) > 0.1, "a trap: σ not scaled, or timesteps reversed"
    expected = rf"{kind.__name__}\.add_noise does not give .*: expected DDPMScheduler or DDIMScheduler"
    with pytest.raises(ConfigurationError, match=expected):
        diffhook.DiffusionObjective(kind(), prediction_type=prediction_type)


def test_asking_how_a_scheduler_mixes_leaves_it_alone() -> None:
    scheduler = PNDMScheduler()
    before = scheduler.alphas_cumprod
    diffhook.DiffusionObjective(scheduler)
    assert scheduler.alphas_cumprod is before
