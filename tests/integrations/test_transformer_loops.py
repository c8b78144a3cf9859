"""Trainings of transformers are probed by two plain lines: with their own samples and conditions, or not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import diffhook
from diffhook.capture.objective.noise import noise_bank
from tests.integrations.transformer_loops import COUNT, GRID, TRAININGS, Change, Item, Training, items

SIDES = (8, 8), (4, 16)  # as many tokens


def last_rows(log: Path) -> dict[str, Any]:
    """Column → values of the last snapshot's probes."""
    table = diffhook.open_log(log).probe
    last = table["step"][:] == table["step"][:].max()
    names = ("sample", "timestep", "noise_seed", "grad_norm", "loss")
    return {name: table[name][last] for name in names}


def assert_rows_are_the_twins(training: Training, log: Path, own: list[Item], *, half: bool = False) -> None:
    """In float64, or all in the training's own precision."""
    model = copy.deepcopy(training.model) if half else copy.deepcopy(training.model).double()
    parameters = [p for p in model.parameters() if p.requires_grad]
    table = last_rows(log)
    assert len(table["sample"]) == 3 * COUNT
    assert set(table["sample"].tolist()) == set(range(COUNT))
    for row in range(0, 3 * COUNT, 7):
        sample = {key: value[None] for key, value in own[int(table["sample"][row])].items()}
        like = training.noise_like(sample["latents"])
        sample["noise"] = noise_bank(torch.tensor([int(table["noise_seed"][row])]), like)
        exact = {n: v.to(parameters[0].dtype) if v.is_floating_point() else v for n, v in sample.items()}
        loss = training.twin(model, exact, exact["noise"], float(table["timestep"][row]))
        shares = torch.autograd.grad(loss, parameters, allow_unused=True)
        expected = torch.cat([g.flatten().double() for g in shares if g is not None]).norm()
        assert table["grad_norm"][row] == pytest.approx(float(expected), rel=0.02 if half else 1e-5)
        assert table["loss"][row] == pytest.approx(float(loss.detach()), rel=0.02 if half else 1e-5)


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("name", TRAININGS)
def test_probes_are_the_batch_1_loops(name: str, lora: bool, tmp_path: Path) -> None:
    training = TRAININGS[name](lora=lora)
    training.run(tmp_path / "log")
    log = diffhook.open_log(tmp_path / "log")
    assert log.objective is not None, log.objective_words
    assert log.objective["timestep_scale"] == (1e-3 if name == "Flux" else 1)
    assert_rows_are_the_twins(training, tmp_path / "log", items())


@pytest.mark.parametrize("name", ["StableDiffusion3", "Flux", "PixArt"])
def test_two_plain_lines_probe_at_the_end_and_the_training_is_bit_identical(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, watched = TRAININGS[name](), TRAININGS[name]()
    plain.run(None)
    watched.run(tmp_path / "log", probe=None, snapshot_every=None)
    assert "the training is over; probing all 24 samples" in capsys.readouterr().out
    left = watched.model.state_dict()
    assert all(torch.equal(value, left[key]) for key, value in plain.model.state_dict().items())
    table = diffhook.open_log(tmp_path / "log").probe
    assert set(table["sample"].tolist()) == set(range(COUNT))
    assert set(table["label"].tolist()) == {-1}
    assert (table["label_contrast"][:] == table["label_contrast"][:]).any(), "no other caption was tried"


@pytest.mark.parametrize("name", ["StableDiffusion3", "Flux", "PixArt"])
def test_probes_of_a_model_in_half_precision_are_the_batch_1_loops(name: str, tmp_path: Path) -> None:
    """The clean samples are not in the loop's calls where it mixes itself, and the model takes no others."""
    training = TRAININGS[name](lora=True, half=True)
    training.run(tmp_path / "log")
    assert_rows_are_the_twins(training, tmp_path / "log", items(), half=True)


def test_samples_of_several_shapes_are_probed_one_at_a_time(tmp_path: Path) -> None:
    training, own = TRAININGS["StableDiffusion3"](), items(SIDES)
    training.run(tmp_path / "log", own, probe=diffhook.Probe(None, GRID, batch_size=1, label_timesteps=0))
    assert_rows_are_the_twins(training, tmp_path / "log", own)


def test_captions_of_ones_own_may_change(tmp_path: Path) -> None:
    """Of several captions, a sample has the first that it came with."""

    def one_of_two(told: dict[str, Any]) -> dict[str, Any]:
        text = told["encoder_hidden_states"]
        return {**told, "encoder_hidden_states": torch.where(torch.rand(len(text), 1, 1) < 0.5, text, -text)}

    TRAININGS["Sana"](change=one_of_two).run(tmp_path / "log")
    assert len(last_rows(tmp_path / "log")["sample"]) == 3 * COUNT


def test_places_may_have_a_row_for_each_sample(tmp_path: Path) -> None:
    """As kohya's scripts and older versions of diffusers' have them."""

    def a_row_each(told: dict[str, Any]) -> dict[str, Any]:
        count = len(told["guidance"])
        return {**told, **{name: told[name].expand(count, -1, -1) for name in ("img_ids", "txt_ids")}}

    training = TRAININGS["Flux"](change=a_row_each)
    training.run(tmp_path / "log", epochs=3)
    assert_rows_are_the_twins(training, tmp_path / "log", items())


def dropped(told: dict[str, Any]) -> dict[str, Any]:
    text = told["encoder_hidden_states"]
    kept = torch.rand(len(text), 1, 1) > 0.1
    return {**told, "encoder_hidden_states": torch.where(kept, text, torch.ones(()))}


def drawn(told: dict[str, Any]) -> dict[str, Any]:
    return {**told, "guidance": 1 + torch.rand(len(told["guidance"]))}


def masked_at_times(told: dict[str, Any]) -> dict[str, Any]:
    mask = told["encoder_attention_mask"]
    return {**told, "encoder_attention_mask": mask if float(torch.rand(())) < 0.5 else None}


REFUSED: dict[str, tuple[str, Change | None, list[Item] | None, str]] = {
    "buckets": (
        "Flux", None, items(SIDES),
        "the model is given 'img_ids', which is not the same for all samples, as of several sizes",
    ),
    "shapes": (
        "StableDiffusion3", None, items(SIDES),
        "samples have several shapes, such as (4, 8, 8) and (4, 4, 16). probe=Probe(512, batch_size=1)",
    ),
    "captions dropped": (
        "StableDiffusion3", dropped, None,
        "the model is given 'encoder_hidden_states', which is a sample's own at one time and at another what",
    ),
    "guidance drawn": ("Flux", drawn, None, "the model is given 'guidance', which changes when a sample"),
    "a mask at times": (
        "Sana", masked_at_times, None, "given 'encoder_attention_mask' in some calls, and in others not",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_given_again_is_refused_with_the_reason(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kind, change, own, why = REFUSED[name]
    training = TRAININGS[kind]() if change is None else TRAININGS[kind](change=change)
    training.run(tmp_path / "log", own, epochs=8)
    log = diffhook.open_log(tmp_path / "log")
    assert log.objective is not None, log.objective_words
    assert len(log.probe) == 0
    assert caplog.text.count(f"no probes: {why}" if why[:5] != "given" else why) == 1
