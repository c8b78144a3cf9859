"""The training loss is recognised right, or refused with the reason: never taken for another one."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from diffhook.capture.objective.distance import Huber, PseudoHuber
from diffhook.capture.objective.weighting import MinSNR
from diffhook.capture.recognition import Recognised, Recognition, Refusal
from diffhook.capture.recognition.noise_offset import NoiseOffset
from tests.capture.losses import BY_HAND, FLOWS, SCHEDULERS, Loss, recognise, slope


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("predicts", ["epsilon", "v", "sample"])
def test_what_is_predicted_of_which_schedule(scheduler: str, predicts: str) -> None:
    found = recognise(Loss(SCHEDULERS[scheduler](), predicts))
    assert isinstance(found, Recognised), found
    assert found.prediction_type.startswith(predicts)
    assert dict(found.scheduler.config) == dict(SCHEDULERS[scheduler]().config)
    assert (found.factor, found.timestep_scale, found.noise_offset.value) == (1, 1, 0)
    assert found.error < 1e-5


@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
@pytest.mark.parametrize("predicts", ["epsilon", "v"])
def test_min_snr_with_its_gamma(predicts: str, gamma: float) -> None:
    found = recognise(Loss(DDPMScheduler(), predicts, weighting="min-snr", gamma=gamma))
    assert isinstance(found, Recognised), found
    assert isinstance(found.weighting, MinSNR)
    assert found.weighting.gamma == pytest.approx(gamma, rel=1e-4)


def test_distances_with_their_parameters() -> None:
    found = [recognise(Loss(DDPMScheduler(), distance=kind)) for kind in ("huber", "smooth", "pseudo-huber")]
    assert all(isinstance(each, Recognised) for each in found), found
    huber, smooth, pseudo = (each.distance for each in found)
    assert isinstance(huber, Huber)
    assert isinstance(smooth, Huber)
    assert isinstance(pseudo, PseudoHuber)
    assert (huber.delta, smooth.delta) == (pytest.approx(0.4, rel=1e-4), pytest.approx(0.25, rel=1e-4))
    assert pseudo.c == pytest.approx(0.1, rel=1e-3)
    assert found[1].factor == pytest.approx(4, rel=1e-4)


def test_flow_matching_mixed_by_a_scheduler_or_by_hand() -> None:
    for predicts, power in (("flow", None), ("by hand", None), ("preconditioned", 2.0)):
        loss = Loss(FlowMatchEulerDiscreteScheduler(), predicts, told_scale=1 / 1000)
        found = recognise(loss)
        assert isinstance(found, Recognised), (predicts, found)
        assert found.prediction_type == "flow_prediction"
        assert found.timestep_scale == pytest.approx(1 / 1000)
        assert getattr(found.weighting, "power", None) == power


@pytest.mark.parametrize("predicts", ["epsilon", "v", "sample", "flow", "by hand", "preconditioned"])
def test_the_sign_of_what_is_squared_tells_nothing(predicts: str) -> None:
    flow = predicts in FLOWS
    scheduler = FlowMatchEulerDiscreteScheduler() if flow else DDPMScheduler()
    one, other = (recognise(Loss(scheduler, predicts, turned=turned)) for turned in (False, True))
    assert isinstance(other, Recognised), other
    assert other.objective().describe() == one.objective().describe()


def _mixed(**odd: Any) -> Any:
    return recognise(Loss(FlowMatchEulerDiscreteScheduler(), "by hand", told_scale=1 / 1000, **odd))


@pytest.mark.parametrize("shown", ["", "itself", "another"])
def test_samples_that_look_like_noise_are_not_taken_for_it(shown: str) -> None:
    """x_t and the target are the same two lines for x and ε, exchanged: only the batch's rows can tell."""
    forwards, reverse = (_mixed(white=True, shown=shown, reversed=turned) for turned in (False, True))
    if shown == "itself":
        assert isinstance(forwards, Recognised), forwards
        assert isinstance(reverse, Recognised), reverse
        assert (forwards.prediction_type, reverse.prediction_type) == ("flow_prediction", "flow_to_sample")
    else:
        assert forwards == reverse == Refusal("either")


@pytest.mark.parametrize("shown", ["", "itself", "another"])
def test_flow_matching_that_is_told_how_much_of_the_sample_there_is(shown: str) -> None:
    found = _mixed(reversed=True, shown=shown)
    assert isinstance(found, Recognised), found
    assert (found.prediction_type, found.timestep_scale) == ("flow_to_sample", pytest.approx(1 / 1000))
    assert _mixed(shown=shown).prediction_type == "flow_prediction"


def test_white_samples_under_coloured_noise_are_not_exchanged_with_it() -> None:
    odd: dict[str, Any] = {"white": True, "colour": True, "shown": "itself"}
    assert _mixed(reversed=True, **odd) == _mixed(**odd) == Refusal("noise")


@pytest.mark.parametrize("predicts", ["epsilon", "v"])
def test_predictions_that_half_precision_hardly_tells_apart_are_not_taken_for_each_other(
    predicts: str,
) -> None:
    """Where there is almost no noise, the velocity is the noise."""
    verdicts = []
    for error in (0.3, 0.6, 3.0):
        loss = Loss(SCHEDULERS["cosine"](), predicts, most=1, error=error)
        verdicts.append(recognise(loss, dtype=torch.bfloat16))
        found = recognise(loss)
        assert isinstance(found, Recognised)
        assert found.prediction_type.startswith(predicts)
    assert verdicts[0].prediction_type.startswith(predicts)
    assert verdicts[2] == Refusal("several")
    assert verdicts[1] == verdicts[2] or verdicts[1].prediction_type.startswith(predicts)


def test_what_a_scheduler_has_mixed_needs_no_judging() -> None:
    for predicts in ("epsilon", "v", "sample"):
        found = recognise(Loss(DDPMScheduler(), predicts, white=True))
        assert isinstance(found, Recognised)
        assert found.prediction_type.startswith(predicts)


def test_variances_in_further_channels_are_left_alone() -> None:
    found = recognise(Loss(DDPMScheduler(), variance=True))
    assert isinstance(found, Recognised)
    assert found.factor == 1


@pytest.mark.parametrize("offset", [0.05, 0.1, 0.12])
def test_a_noise_offset_is_the_number_that_is_meant(offset: float) -> None:
    """Of few rows, whose error is told."""
    found = []
    for seed in range(20):
        draw, measuring = torch.Generator().manual_seed(seed), NoiseOffset()
        noise = torch.randn(64, 4, 32, 32, generator=draw)
        measuring.add(noise + offset * torch.randn(64, 4, 1, 1, generator=draw))
        found.append(measuring.estimate())
        assert abs(found[-1].measured - offset) < 4 * found[-1].error < 0.3 * offset
    assert sum(each.value == offset for each in found) >= (18 if offset in (0.05, 0.1) else 8)
    assert all(abs(each.value - offset) < 4 * each.error for each in found)


@pytest.mark.parametrize("offset", [0.1, 0.15])
def test_a_usual_noise_offset_is_not_missed_by_chance(offset: float) -> None:
    """Of rows as few as recognition takes, one run in twenty is off by twice the error that it measures."""
    missed, off = 0, 0
    for seed in range(400):
        draw, measuring = torch.Generator().manual_seed(seed), NoiseOffset()
        noise = torch.randn(64, 4, 16, 16, generator=draw)
        measuring.add(noise + offset * torch.randn(64, 4, 1, 1, generator=draw))
        found = measuring.estimate()
        missed += found.value != offset
        off += abs(found.measured - offset) > 2 * found.error
    assert off >= 10, "no run of these is one by chance: the test shows nothing"
    assert missed <= 4


def test_no_noise_offset_is_none() -> None:
    draw, measuring = torch.Generator().manual_seed(0), NoiseOffset()
    measuring.add(torch.randn(64, 4, 32, 32, generator=draw))
    assert measuring.estimate().value == 0


def test_noise_offset_is_estimated() -> None:
    found = recognise(Loss(DDPMScheduler(), offset=0.1), passes=3)
    assert isinstance(found, Recognised)
    assert found.objective().noise_offset == found.noise_offset.value == 0.1
    assert f"noise offset 0.1 (measured: {found.noise_offset.measured:.3f} ± " in found.words


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_recognised(dtype: torch.dtype) -> None:
    found = recognise(Loss(DDPMScheduler(), "v", weighting="min-snr"), dtype=dtype)
    assert isinstance(found, Recognised), found
    assert found.weighting.describe() == {"kind": "min_snr", "gamma": pytest.approx(5, rel=2e-2)}


@pytest.mark.parametrize(
    ("reason", "odd"),
    [
        ("target", {"perturbation": 0.1}),
        ("target", {"predicts": "denoised by EDM"}),
        ("target", {"distance": "fourth power"}),
        ("weights", {"weighting": "sines"}),
        ("weights", {"weighting": "by row"}),
        ("noise", {"colour": True}),
        ("variance", {"variance": True, "variance_term": 1e-3}),
        ("variance", {"variance": True, "variance_term": 1e-3, "own": True, "shown": "itself"}),
    ],
)
def test_what_is_not_known_is_refused(reason: str, odd: dict[str, Any]) -> None:
    found = recognise(Loss(DDPMScheduler(), **odd))
    assert found == Refusal(reason)
    assert "objective=" in found.words


@pytest.mark.parametrize(
    ("odd", "approximate"),
    [
        ({"perturbation": 0.1}, True),
        ({"distance": "fourth power"}, True),
        ({"weighting": "by row"}, True),
        ({"colour": True}, True),
        ({"variance": True, "variance_term": 1e-3}, True),
        ({"reversed": True, "white": True}, False),
    ],
)
def test_an_objective_that_can_only_be_near_is_called_an_approximation(
    odd: dict[str, Any], approximate: bool
) -> None:
    found = _mixed(**odd) if "reversed" in odd else recognise(Loss(DDPMScheduler(), **odd))
    assert ("approximation" in found.words) == approximate


def _ended(losses: list[Loss], rows: int = 8, passes: int | None = None, **options: Any) -> Any:
    draw, recognition = torch.Generator().manual_seed(0), Recognition()
    for loss in losses:
        recognition.add(loss.observe(draw, rows))
    return recognition.end(len(losses) if passes is None else passes, **options)


def test_a_run_that_ends_early_is_told_what_would_help() -> None:
    plain, odd = Loss(DDPMScheduler()), Loss(DDPMScheduler(), distance="fourth power")
    assert "every=1" in _ended([plain] * 3, thinned=True).words
    assert "every=1" not in _ended([plain] * 3).words
    assert "showed it, 24, and 64 of two batches are needed: train longer." in _ended([plain] * 3).words
    assert _ended([Loss(DDPMScheduler(), weighting="by row")] * 10) == Refusal("unsettled", 80, early=True)
    assert "80 captured rows showed it" in Refusal("unsettled", 80, early=True).words
    assert _ended([odd] * 2) == Refusal("target", early=True)  # of each of the few rows there are
    assert _ended([], passes=0) == Refusal("uncaptured", early=True)
    assert _ended([], passes=5) == Refusal("unseen", early=True)
    for kind in ("uncaptured", "unseen", "overflowed"):
        assert "every=1" not in Refusal(kind, early=True).words


def test_gradients_that_overflow_are_told_as_such() -> None:
    recognition = Recognition()
    seen = Loss(DDPMScheduler()).observe(torch.Generator().manual_seed(0))
    recognition.add(replace(seen, gradient=seen.gradient / 0))
    assert recognition.end(1) == Refusal("overflowed", early=True)


def test_a_loss_that_changes_is_no_longer_known() -> None:
    draw, recognition = torch.Generator().manual_seed(0), Recognition()
    for loss in [Loss(DDPMScheduler())] * 4 + [Loss(DDPMScheduler(), "v")] * 3:
        recognition.add(loss.observe(draw))
    assert recognition.verdict == Refusal("changed")


@pytest.mark.parametrize("when", [0, 1, 5])
def test_an_odd_pass_is_no_other_loss(when: int) -> None:
    draw, recognition = torch.Generator().manual_seed(0), Recognition()
    losses = [Loss(DDPMScheduler(), weighting="min-snr")] * 8
    for loss in (*losses[:when], Loss(DDPMScheduler(), distance="fourth power"), *losses[when:]):
        recognition.add(loss.observe(draw))
    assert isinstance(recognition.verdict, Recognised), recognition.verdict
    assert recognition.verdict.weighting.describe() == {"kind": "min_snr", "gamma": pytest.approx(5)}


@pytest.mark.parametrize("when", [1, 3, 6])
def test_a_pipeline_that_is_saved_while_training_changes_nothing(when: int, tmp_path: Path) -> None:
    """diffusers notes its version and the class in the scheduler's configuration then."""
    draw, recognition, loss = torch.Generator().manual_seed(0), Recognition(), Loss(DDPMScheduler())
    for number in range(12):
        if number == when:
            loss.scheduler.save_pretrained(tmp_path)
            assert "_class_name" in loss.scheduler.config
        assert recognition.add(loss.observe(draw)) is not None
    assert isinstance(recognition.verdict, Recognised), recognition.verdict


def test_steps_that_a_scheduler_was_given_by_place_count() -> None:
    """diffusers takes them for a default, which it drops in making a scheduler from the configuration."""
    found = recognise(Loss(DDPMScheduler(100)))
    assert isinstance(found, Recognised), found
    assert found.objective().num_timesteps == 100


def test_samples_of_several_schedulers_are_refused_as_such() -> None:
    draw, recognition = torch.Generator().manual_seed(0), Recognition()
    for scheduler in [DDPMScheduler(), SCHEDULERS["cosine"]()] * 4:
        recognition.add(Loss(scheduler).observe(draw))
    assert recognition.verdict == Refusal("schedulers")


def test_two_losses_by_turns_are_none() -> None:
    draw, recognition = torch.Generator().manual_seed(0), Recognition()
    for loss in [Loss(DDPMScheduler()), Loss(DDPMScheduler(), "v")] * 4:
        recognition.add(loss.observe(draw))
    assert isinstance(recognition.verdict, Refusal)


def test_the_recognised_objective_gives_the_same_gradients() -> None:
    """Of a model's parameters, to 1e-4: the objective is run on the clean samples and the very noise."""
    scheduler = SCHEDULERS["stable diffusion"]()
    loss = Loss(scheduler, "v", "pseudo-huber", "min-snr", factor=0.5)
    found = recognise(loss)
    assert isinstance(found, Recognised), found
    seen = loss.observe(torch.Generator().manual_seed(9))
    assert seen.mixing is not None
    torch.testing.assert_close(slope(found, seen.mixing, seen.output), seen.gradient, rtol=1e-3, atol=1e-8)


def _drawn(draw: random.Random) -> tuple[Loss, bool]:
    """A random loss, and whether it is one that can be written as an objective of ours."""
    predicts = draw.choice(["epsilon", "v", "sample", "flow", "by hand", "preconditioned", "denoised by EDM"])
    flow = predicts in FLOWS
    weighting = draw.choice(
        ["uniform", "sines", "by row", *(["sigma_sqrt", "cosmap"] if flow else ["min-snr", "debiased", "p2"])]
    )
    if predicts == "denoised by EDM":
        weighting = "uniform"
    loss = Loss(
        FlowMatchEulerDiscreteScheduler() if flow else draw.choice(list(SCHEDULERS.values()))(),
        predicts,
        draw.choice(["squared", "squared", "absolute", "huber", "smooth", "pseudo-huber", "fourth power"]),
        weighting,
        gamma=draw.choice([1.0, 3.0, 5.0]),
        offset=draw.choice([0.0, 0.0, 0.1]),
        # Of the sample's own error it changes nothing; of a flow that is mixed by hand it cannot be seen.
        perturbation=0.0 if predicts in ("sample", *BY_HAND) else draw.choice([0.0, 0.0, 0.0, 0.1]),
        factor=draw.choice([1.0, 1.0, 0.5, 3.0]),
        told_scale=draw.choice([1.0, 1.0, 1 / 1000]),
        colour=draw.random() < 0.1,
    )
    return loss, not (
        loss.perturbation
        or loss.colour
        or loss.distance == "fourth power"
        or loss.weighting in ("sines", "by row")
        or predicts == "denoised by EDM"
    )


def test_random_losses_are_recognised_right_or_refused() -> None:
    draw, recognised = random.Random(0), 0
    for number in range(200):
        loss, known = _drawn(draw)
        found = recognise(loss, number, passes=8)
        if not isinstance(found, Recognised):
            continue
        assert known, (loss, found)
        recognised += 1
        kind = "flow" if loss.predicts in BY_HAND else loss.predicts
        assert found.prediction_type.startswith(kind), (loss, found)
        seen = loss.observe(torch.Generator().manual_seed(7))
        mixing = seen.mixing or Recognition().add(seen)
        assert mixing is not None
        gradient = slope(found, mixing, seen.output)
        error = (gradient - seen.gradient).norm() / seen.gradient.norm()
        assert error < 1e-3, (loss, found, error)
    assert recognised > 40
