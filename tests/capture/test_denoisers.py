"""Pipelines with transformers: rows are those of training scripts, conditions those of the pipelines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from torch import Tensor, nn

from diffhook.capture import Grid, measure
from diffhook.capture.model.pipeline import SavedPipeline
from diffhook.capture.objective.noise import noise_bank, noise_seed
from diffhook.capture.samples.inputs import default_inputs
from diffhook.errors import ConfigurationError
from diffhook.gradients import PerSampleGradients
from tests import denoisers, script_twins
from tests.pipelines import CAPTIONS, SIZE, images
from tests.twins import sample_gradients

_TOLD = {"resolution": SIZE, "max_sequence_length": denoisers.TOKENS}


class Case(NamedTuple):
    save: Callable[[Path], Path]
    twin: type[script_twins.Twin]
    options: dict[str, Any] = _TOLD


CASES = {
    "dit": Case(denoisers.save_dit, script_twins.DiT, {}),
    "pixart-alpha": Case(denoisers.save_pixart, script_twins.PixArt),
    "pixart-told-sizes": Case(denoisers.save_pixart_told_sizes, script_twins.PixArt),
    "pixart-sigma": Case(denoisers.save_pixart_sigma, script_twins.PixArt),
    "stable-diffusion-3": Case(denoisers.save_stable_diffusion_3, script_twins.StableDiffusion3),
    "flux": Case(denoisers.save_flux, script_twins.Flux),
    "flux-without-guidance": Case(lambda folder: denoisers.save_flux(folder, False), script_twins.Flux),
    "sana": Case(denoisers.save_sana, script_twins.Sana),
    "aura-flow": Case(denoisers.save_aura_flow, script_twins.AuraFlow),
}


def opened(case: Case, root: Path) -> SavedPipeline:
    return SavedPipeline(case.save(root / "pipeline"), "cpu", **case.options)


def encoded(pipeline: SavedPipeline) -> dict[str, Any]:
    batch = pipeline.encode(images(), CAPTIONS if pipeline.takes_captions else None)
    if pipeline.classes is not None:
        batch["class_labels"] = torch.arange(4) % 2
    return batch


@pytest.mark.parametrize("name", CASES)
def test_rows_are_those_of_the_training_script_one_sample_at_a_time(name: str, tmp_path: Path) -> None:
    pipeline = opened(CASES[name], tmp_path)
    twin = CASES[name].twin(pipeline.path)
    batch, objective = encoded(pipeline), pipeline.objective()
    engine = PerSampleGradients(pipeline.denoiser, projection_dim=0, weight_gradients=False)
    grid = Grid(3)
    parts = list(measure(engine, objective, batch, range(4), grid, step=0, lr=1, weight=1, batch_size=5))
    found = {
        (int(s), float(t)): (float(norm), float(loss))
        for part in parts
        for s, t, norm, loss in zip(
            part["sample"], part["timestep"], part["grad_norm"], part["loss"], strict=True
        )
    }
    timesteps = grid.timesteps_of(objective)
    assert len(found) == 12
    latents = twin.latents(images())
    for timestep in timesteps:
        seeds = torch.full((4,), noise_seed(0, timestep, 0))
        own = {
            "latents": latents,
            "noise": twin.noise(noise_bank(seeds, batch["latents"]), latents),
            "timesteps": torch.full((4,), timestep),
            **twin.told(CAPTIONS),
        }
        losses: list[float] = []

        def loss(model: nn.Module, sample: Any, losses: list[float] = losses) -> Tensor:
            values = twin.loss(model, sample)
            losses.append(float(values.detach()))
            return values

        norms = sample_gradients(pipeline.denoiser, loss, own).norm(dim=1)
        rows = [found[sample, float(np.float32(timestep))] for sample in range(4)]
        np.testing.assert_allclose([norm for norm, _ in rows], norms, rtol=2e-4)
        np.testing.assert_allclose([value for _, value in rows], losses, rtol=2e-5)
        assert len(set(losses)) == 4, "samples that are alike test nothing"


@pytest.mark.parametrize("name", [name for name in CASES if name != "dit"])
def test_the_denoiser_is_told_what_the_pipeline_tells_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the last rows of the pipeline's first call are: the first may be of guidance."""
    pipeline = opened(CASES[name], tmp_path)
    size = 2 * SIZE if name == "sana" else SIZE  # Sana's pipeline makes no others
    told = default_inputs({"latents": torch.zeros(2), **pipeline.conditions(2, CAPTIONS[:2], (size, size))})[
        1
    ]
    calls: list[dict[str, Any]] = []
    forward = pipeline.denoiser.forward

    def noted(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return forward(*args, **kwargs)

    monkeypatch.setattr(pipeline.denoiser, "forward", noted)
    monkeypatch.setattr(type(pipeline.family), "size", (size, size))
    latents = pipeline.generate(CAPTIONS[:2], [1, 2], 2)
    monkeypatch.undo()
    for argument, value in told.items():
        same = calls[0][argument]
        for one, other in zip(_leaves(value), _leaves(same), strict=True):
            torch.testing.assert_close(one, other[-len(one) :].to(one.dtype), msg=argument)
    first = float(pipeline.pipe.scheduler.timesteps[0]) * pipeline.family.timestep_scale
    assert float(calls[0]["timestep"][-1]) == pytest.approx(first, rel=1e-6)
    assert latents.shape[1:] == pipeline.family.pack(torch.zeros(1, 4, size // 2, size // 2)).shape[1:]


def _leaves(value: Any) -> list[Tensor]:
    return list(value.values()) if isinstance(value, dict) else [value]


def test_flux_latents_are_packed_and_come_back(tmp_path: Path) -> None:
    pipeline = opened(CASES["flux"], tmp_path)
    latents = torch.randn(3, 4, 6, 8)
    packed = pipeline.family.pack(latents)
    assert torch.equal(packed, FluxPipeline._pack_latents(latents, 3, 4, 6, 8))
    assert torch.equal(pipeline.family.unpack(packed, (12, 16)), latents)
    vae = pipeline.vae
    expected = vae.decode(vae.encode(images()).latent_dist.mode()).sample.clamp(-1, 1)
    torch.testing.assert_close(pipeline.decode(encoded(pipeline)["latents"]), expected)


def test_what_a_training_chose_can_be_said_and_is_checked(tmp_path: Path) -> None:
    flux = denoisers.save_flux(tmp_path / "flux")
    assert SavedPipeline(flux, "cpu").size == (256, 256), "latents of 128, two pixels each"
    pipeline = SavedPipeline(flux, "cpu", resolution=20, max_sequence_length=7, guidance_scale=1.5)
    batch = pipeline.encode(torch.zeros(2, 3, 20, 20), CAPTIONS[:2])
    assert batch["encoder_hidden_states"].shape[1] == 7
    assert batch["guidance"].tolist() == [1.5, 1.5]
    assert batch["latents"].shape == (2, 25, 16)
    with pytest.raises(ConfigurationError, match="resolution is 18; a FluxPipeline takes multiples of 4"):
        SavedPipeline(flux, "cpu", resolution=18)
    dit = denoisers.save_dit(tmp_path / "dit")
    with pytest.raises(ConfigurationError, match="a DiTPipeline is not trained with a guidance_scale: leave"):
        SavedPipeline(dit, "cpu", guidance_scale=4.0)


def test_another_loss_than_the_scripts_default_is_said_with_its_weighting(tmp_path: Path) -> None:
    pipeline = opened(CASES["stable-diffusion-3"], tmp_path)
    assert pipeline.objective().describe()["weighting"] == {"kind": "sigma_power", "power": 2.0}
    assert pipeline.objective(weighting="uniform").describe()["weighting"] == {"kind": "uniform"}


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("WanPipeline", r"trained on videos, and images are read here\)"),
        ("LTXPipeline", "trained on videos"),
        ("Lumina2Pipeline", "told how much of the sample is in its input, and not how much noise"),
        ("FluxKontextPipeline", "given more than an image and a caption"),
        ("QwenImagePipeline", "how its model was trained is not known here"),
        ("SomeNewPipeline", "a SomeNewPipeline; supported"),
    ],
)
def test_a_family_that_is_not_served_is_refused_before_anything_is_loaded(
    tmp_path: Path, kind: str, why: str
) -> None:
    """Of the folder, only model_index.json is there."""
    index = {"_class_name": kind, "_diffusers_version": "0.42.1", "transformer": ["diffusers", "Transformer"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigurationError, match=why) as refused:
        SavedPipeline(tmp_path)
    assert f"holds a {kind}" in str(refused.value)
    assert "supported are DDPMPipeline" in str(refused.value)
    assert "model=..." in str(refused.value)
