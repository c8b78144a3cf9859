"""A saved pipeline: what it makes of images and captions, against its parts called directly."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMPipeline, DDPMScheduler
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffhook.capture import DiffusionObjective, Grid, MinSNR, measure
from diffhook.capture.model.adapter import add_adapters
from diffhook.capture.model.pipeline import SavedPipeline
from diffhook.capture.objective.noise import noise_seed
from diffhook.errors import ConfigurationError
from diffhook.gradients import PerSampleGradients
from tests.models import unet
from tests.pipelines import CAPTIONS, SIZE, images, save_stable_diffusion, save_stable_diffusion_xl
from tests.twins import sample_gradients


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_stable_diffusion(tmp_path_factory.mktemp("sd") / "pipeline")


@pytest.fixture(scope="module")
def saved_xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_stable_diffusion_xl(tmp_path_factory.mktemp("xl") / "pipeline")


def tokens(folder: Path) -> torch.Tensor:
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    found = tokenizer(CAPTIONS, padding="max_length", max_length=12, truncation=True, return_tensors="pt")
    return found.input_ids


@torch.no_grad()
def test_images_become_scaled_means_of_the_posterior(saved: Path) -> None:
    pipeline = SavedPipeline(saved, "cpu")
    vae = AutoencoderKL.from_pretrained(saved / "vae")
    latents = pipeline.encode(images(), CAPTIONS)["latents"]
    expected = (vae.encode(images()).latent_dist.mean - 0.1) * 0.7
    torch.testing.assert_close(latents, expected)
    decoded = pipeline.decode(latents)
    torch.testing.assert_close(decoded, vae.decode(latents / 0.7 + 0.1).sample.clamp(-1, 1))
    assert (pipeline.size, pipeline.channels) == ((SIZE, SIZE), 3)


@torch.no_grad()
def test_captions_become_what_the_training_scripts_pass(saved: Path) -> None:
    batch = SavedPipeline(saved, "cpu").encode(images(), CAPTIONS)
    encoder = CLIPTextModel.from_pretrained(saved / "text_encoder").eval()
    expected = encoder(tokens(saved / "tokenizer"), return_dict=False)[0]
    assert batch.keys() == {"latents", "encoder_hidden_states"}
    torch.testing.assert_close(batch["encoder_hidden_states"], expected)
    assert len(expected.flatten(1).unique(dim=0)) == 4, "captions that look alike to the encoder test nothing"


@torch.no_grad()
def test_two_encoders_and_sizes_condition_the_larger_model(saved_xl: Path) -> None:
    pipeline = SavedPipeline(saved_xl, "cpu")
    batch = pipeline.encode(images(), CAPTIONS)
    first = CLIPTextModel.from_pretrained(saved_xl / "text_encoder").eval()
    second = CLIPTextModelWithProjection.from_pretrained(saved_xl / "text_encoder_2").eval()
    one = first(tokens(saved_xl / "tokenizer"), output_hidden_states=True)
    two = second(tokens(saved_xl / "tokenizer_2"), output_hidden_states=True)
    hidden = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], -1)
    torch.testing.assert_close(batch["encoder_hidden_states"], hidden)
    added = batch["added_cond_kwargs"]
    torch.testing.assert_close(added["text_embeds"], two.text_embeds)
    assert added["time_ids"].tolist() == [[SIZE, SIZE, 0, 0, SIZE, SIZE]] * 4
    output = pipeline.denoiser(batch["latents"], torch.full((4,), 5), hidden, added_cond_kwargs=added)
    assert output.sample.shape == batch["latents"].shape


def test_rows_of_conditioned_samples_equal_autograd(saved_xl: Path) -> None:
    """Nested conditions go with their samples through the grid."""
    pipeline = SavedPipeline(saved_xl, "cpu")
    objective = DiffusionObjective(pipeline.training_scheduler(), weighting=MinSNR())
    batch = pipeline.encode(images(), CAPTIONS)
    engine = PerSampleGradients(pipeline.denoiser, projection_dim=0, weight_gradients=False)
    parts = list(
        measure(engine, objective, batch, range(4), Grid([400]), step=0, lr=1, weight=1, batch_size=3)
    )
    found = np.concatenate([part["grad_norm"] for part in parts])

    def loss(model: nn.Module, samples: Any) -> torch.Tensor:
        count = len(samples["latents"])
        seeds = torch.full((count,), noise_seed(0, 400, 0))
        return objective(model, samples, torch.full((count,), 400), seeds)

    expected = sample_gradients(pipeline.denoiser, loss, batch).norm(dim=1)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_a_pipeline_saved_in_half_precision_is_loaded_in_float32(saved: Path, tmp_path: Path) -> None:
    half = SavedPipeline(saved, "cpu").pipe
    for name in ("unet", "vae", "text_encoder"):
        getattr(half, name).half()
    half.save_pretrained(tmp_path / "half")
    loaded = SavedPipeline(tmp_path / "half", "cpu").pipe
    dtypes = {p.dtype for name in ("unet", "vae", "text_encoder") for p in getattr(loaded, name).parameters()}
    assert dtypes == {torch.float32}


def test_a_missing_library_is_named_with_the_extra_that_brings_it(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffhook.capture.model.pipeline.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"need transformers: pip install 'diffhook\[pipelines\]'"):
        SavedPipeline(saved)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigurationError, match=r"need peft: pip install 'diffhook\[pipelines\]'"):
        add_adapters(unet().model, {"default": {"peft_type": "LORA"}})


def test_the_schedule_is_that_of_training_not_of_sampling(saved: Path) -> None:
    scheduler = SavedPipeline(saved, "cpu").training_scheduler()
    assert type(scheduler) is DDPMScheduler
    assert scheduler.config.beta_schedule == "scaled_linear"
    assert scheduler.config.beta_end == 0.012


@pytest.mark.parametrize("kind", ["saved", "saved_xl"])
def test_generated_latents_depend_on_their_own_seed_only(kind: str, request: pytest.FixtureRequest) -> None:
    pipeline = SavedPipeline(request.getfixturevalue(kind), "cpu")
    together = pipeline.generate(CAPTIONS[:3], [5, 6, 7], 2)
    alone = pipeline.generate(CAPTIONS[1:2], [6], 2)
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together[0], together[1])
    assert pipeline.decode(together).shape == (3, 3, SIZE, SIZE)


def test_a_pipeline_on_pixels_passes_images_through(tmp_path: Path) -> None:
    DDPMPipeline(unet().model, DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    pipeline = SavedPipeline(tmp_path / "ddpm", "cpu")
    pictures = torch.randn(2, 1, 16, 16)
    batch = pipeline.encode(pictures)
    assert batch.keys() == {"latents"}
    assert torch.equal(batch["latents"], pictures)
    assert torch.equal(pipeline.decode(pictures), pictures)
    assert (pipeline.size, pipeline.channels) == ((16, 16), 1)
    with pytest.raises(ConfigurationError, match="DDPMPipeline takes no captions"):
        pipeline.encode(pictures, ["a", "b"])


def test_what_does_not_fit_is_named(saved: Path, tmp_path: Path) -> None:
    pipeline = SavedPipeline(saved, "cpu")
    with pytest.raises(ConfigurationError, match="StableDiffusionPipeline takes captions: give one per"):
        pipeline.encode(images())
    with pytest.raises(ConfigurationError, match="there are 3 captions for 4 images"):
        pipeline.encode(images(), CAPTIONS[:3])
    with pytest.raises(ConfigurationError, match=r"no pipeline at .*model_index\.json"):
        SavedPipeline(tmp_path)
