"""`diffhook query`: a text-to-image LoRA run from end to end, generated images, ids, and bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

import diffhook
from diffhook.capture.model.pipeline import SavedPipeline
from diffhook.capture.objective.noise import noise_bank, noise_seed
from diffhook.cli import main
from diffhook.cli.main import parser
from diffhook.cli.pictures import Pictures, to_pixels
from diffhook.cli.query import _objective
from diffhook.errors import ConfigurationError
from diffhook.queries.rebuilt import build_model
from tests.checkpoints.test_formats import diffusers_lora, kohya_lora
from tests.models import unet
from tests.pipelines import LORA, SIZE, images, lora_run, train_lora
from tests.runs import SCHEDULER, train
from tests.twins import sample_gradients

ASKED = images(2, seed=5)
TEXTS = ["a cat", "the red sea"]


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline, the log of a LoRA run on it without any objective, and images to ask about."""
    root = lora_run(tmp_path_factory.mktemp("lora"))
    _save(root / "asked", ASKED)
    (root / "asked.txt").write_text("\n".join(TEXTS) + "\n")
    return root


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A UNet's log that records its loss, and the images of the training."""
    root = tmp_path_factory.mktemp("pixels")
    data = images(6)[:, :1]
    objective = diffhook.DiffusionObjective(SCHEDULER, weighting=diffhook.MinSNR())
    probe = diffhook.Probe(1, diffhook.Grid(1))
    train(
        root / "log", make_model=lambda: unet().model, data=data, objective=objective, probe=probe,
        projection_dim=64, epochs=1,
    )  # fmt: skip
    _save(root / "images", data)
    return root


def _save(folder: Path, pictures: Tensor) -> None:
    folder.mkdir()
    for index, picture in enumerate(pictures):
        array = ((picture + 1) * 127.5).round().byte().permute(1, 2, 0).squeeze(2).numpy()
        Image.fromarray(array).save(folder / f"{index}.png")


def run(*arguments: Any) -> int:
    try:
        return main([str(a) for a in arguments])
    except SystemExit as error:  # argparse's own
        return int(error.code or 0)


def _direct_model(root: Path, snapshot: Any) -> nn.Module:
    model = UNet2DConditionModel.from_pretrained(root / "pipeline" / "unet").requires_grad_(False)
    model.add_adapter(LORA)
    state = safetensors.torch.load(snapshot.parameters())
    assert not model.load_state_dict(state, strict=False).unexpected_keys
    return model.eval()


@torch.no_grad()
def _direct_inputs(folder: Path) -> tuple[Tensor, Tensor]:
    """Latents (2, 4, h, w) and hidden states (2, L, C) of what is asked."""
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder").eval()
    words = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    tokens = words(TEXTS, padding="max_length", max_length=12, return_tensors="pt").input_ids
    return (vae.encode(ASKED).latent_dist.mean - 0.1) * 0.7, encoder(tokens)[0]


def _loss(model: nn.Module, batch: Any) -> Tensor:
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    latents, text, noise, timesteps = batch
    predicted = model(scheduler.add_noise(latents, noise, timesteps), timesteps, text).sample
    return (predicted - noise).square().flatten(1).mean(1)


def test_a_lora_run_is_queried_with_images_and_captions(
    lora: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = lora / "log"
    asked = ("query", log, "--images", lora / "asked", "--captions", lora / "asked.txt", "--name", "mine")
    grid = ("--timesteps", 2, "--draws", 2, "--replicates", 2)
    assert run(*asked, "--pipeline", lora / "pipeline", *grid, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["queries"] == 2
    assert printed["snapshots"] == [2, 4]
    assert run("influence", log, "--queries", "mine", "--top", 2, "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["queries"]) == 2

    opened = diffhook.open_log(log)
    table = opened.queries["mine"]
    assert len(table) == 2 * 2 * 2 * 2
    assert table.description["objective"]["scheduler"] == "DDPMScheduler"
    latents, text = _direct_inputs(lora / "pipeline")
    models = {snapshot.step: _direct_model(lora, snapshot) for snapshot in opened.snapshots}
    for i in (0, 7, 10, 15):
        q, t, r, seed = (int(table[c][i]) for c in ("sample", "timestep", "replicate", "noise_seed"))
        seeds = torch.tensor([noise_seed(0, t, 2 * r + m, q) for m in (0, 1)])
        assert seed == seeds[0], "a log without probes is asked with noise of the queries' own"
        batch = (
            latents[q].expand(2, -1, -1, -1), text[q].expand(2, -1, -1),
            noise_bank(seeds, latents), torch.tensor([t, t]),
        )  # fmt: skip
        gradient = sample_gradients(models[int(table["step"][i])], _loss, batch).mean(0)
        np.testing.assert_allclose(table["grad_norm"][i], float(gradient.norm()), rtol=1e-4)
        error = np.linalg.norm(table["projection"][i] - (gradient / gradient.norm()).numpy())
        assert error < 1e-4, "the gradient is not that of the caption, image, snapshot and noise of its row"


def test_a_scheduler_named_beside_a_pipeline_or_a_log_has_their_betas(
    lora: Path, pixels: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = ("--timesteps", 1, "--draws", 1, "--name", "ddpm", "--overwrite")
    asked = ("query", lora / "log", "--images", lora / "asked", "--captions", lora / "asked.txt",
             "--pipeline", lora / "pipeline", *grid)  # fmt: skip
    assert run(*asked, "--scheduler", "DDIMScheduler") == 0
    found = diffhook.open_log(lora / "log").queries["ddpm"].description["objective"]
    assert found["scheduler"] == "DDIMScheduler"
    config = found["scheduler_config"]
    betas = (config["beta_start"], config["beta_end"], config["beta_schedule"])
    assert betas == (0.00085, 0.012, "scaled_linear")
    assert run(*asked, "--scheduler", "EulerDiscreteScheduler") == 2
    assert "EulerDiscreteScheduler.add_noise does not give" in capsys.readouterr().err

    own = ("query", pixels / "log", "--images", pixels / "images", "--scheduler", "DDIMScheduler", *grid)
    recorded = diffhook.open_log(pixels / "log")
    recorded.config["identity"]["objective"]["scheduler_config"]["beta_end"] = 0.03
    args = parser("query").parse_args([str(a) for a in own])
    assert _objective(recorded, args, None).scheduler.config.beta_end == 0.03


def test_a_lora_run_with_probes_records_the_loss_that_its_queries_use(lora: Path, tmp_path: Path) -> None:
    pipe = SavedPipeline(lora / "pipeline", "cpu").pipe

    def inputs(batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        latents = (pipe.vae.encode(batch["pixel_values"]).latent_dist.mode() - 0.1) * 0.7
        return latents, {"encoder_hidden_states": pipe.text_encoder(batch["input_ids"])[0]}

    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    objective = diffhook.DiffusionObjective(scheduler, inputs, weighting=diffhook.MinSNR(2.0))
    probe = diffhook.Probe(samples=None, grid=diffhook.Grid(2))
    train_lora(lora / "pipeline", tmp_path / "log", projection_dim=64, objective=objective, probe=probe)
    common = ("query", tmp_path / "log", "--pipeline", lora / "pipeline", "--images", lora / "asked",
              "--captions", lora / "asked.txt", "--name", "mine", "--timesteps", 2)  # fmt: skip
    assert run(*common) == 0
    log = diffhook.open_log(tmp_path / "log")
    assert len(log.probe) == 4 * 2 * 2
    assert log.queries["mine"].description["objective"] == objective.describe()
    assert diffhook.influence(log, "mine", source="probe").values.shape == (2, 4)


def test_captions_and_adapters_come_from_files_too(
    lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.dumps({"file_name": f"{i}.png", "text": TEXTS[i]}) for i in (1, 0)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    LORA.save_pretrained(str(tmp_path))
    common = ("query", lora / "log", "--images", lora / "asked", "--pipeline", lora / "pipeline",
              "--timesteps", 1, "--draws", 1)  # fmt: skip
    named = ("--captions", tmp_path / "metadata.jsonl", "--lora", tmp_path, "--name", "named")
    assert run(*common, *named) == 0
    assert run(*common, "--caption", TEXTS[0], "--name", "same", "--ids", "0") == 0
    assert "1 query at 2 snapshots" in capsys.readouterr().out
    queries = diffhook.open_log(lora / "log").queries
    first = queries["named"]["sample"] == 0
    np.testing.assert_allclose(queries["named"]["grad_norm"][first], queries["same"]["grad_norm"], rtol=1e-4)


@pytest.mark.parametrize("save", [diffusers_lora, kohya_lora])
def test_an_adapter_comes_from_its_file_by_a_trainers_names(
    lora: Path, tmp_path: Path, save: Callable[[Any, Path], None]
) -> None:
    save(_direct_model(lora, diffhook.open_log(lora / "log").snapshots[-1]), tmp_path / "file")
    (file,) = (tmp_path / "file").glob("*.safetensors")
    asked = ("query", lora / "log", "--images", lora / "asked", "--caption", TEXTS[0], "--overwrite",
             "--pipeline", lora / "pipeline", "--timesteps", 1, "--draws", 1, "--name")  # fmt: skip
    assert run(*asked, "recorded") == 0
    assert run(*asked, "by-file", "--lora", file) == 0
    queries = diffhook.open_log(lora / "log").queries
    for column in ("grad_norm", "projection"):
        np.testing.assert_array_equal(queries["by-file"][column], queries["recorded"][column])


def test_a_file_without_a_lora_is_refused(lora: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (file,) = (lora / "pipeline" / "unet").glob("*.safetensors")
    asked = (
        "query",
        lora / "log",
        "--images",
        lora / "asked",
        "--pipeline",
        lora / "pipeline",
        "--name",
        "no",
    )
    assert run(*asked, "--caption", "x", "--lora", file) == 2
    assert "holds no adapter of a denoiser" in capsys.readouterr().err


def test_a_lora_run_is_asked_about_what_it_generates(
    lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = ("query", lora / "log", "--generate", 2, "--seed", 3, "--steps", 2, "--caption", "a cat",
            "--pipeline", lora / "pipeline", "--name", "made", "--save", tmp_path / "made",
            "--timesteps", 1, "--draws", 1, "--snapshot", 2, "--json")  # fmt: skip
    assert run(*made) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["seeds"] == [3, 4]
    assert printed["captions"] == ["a cat", "a cat"]
    assert printed["snapshot"] == [2, 0]
    saved = sorted((tmp_path / "made").iterdir())
    assert [Image.open(file).size for file in saved] == [(SIZE, SIZE)] * 2
    assert len(diffhook.open_log(lora / "log").queries["made"]) == 2 * 2 * 2  # queries, snapshots, replicates


def test_generated_and_training_images_of_a_pixel_model(pixels: Path, tmp_path: Path) -> None:
    small = ("--timesteps", 1, "--draws", 1)
    made = ("query", pixels / "log", "--generate", 2, "--steps", 2, "--save", tmp_path, "--name", "made")
    assert run(*made, *small) == 0
    assert len(list(tmp_path.glob("*.png"))) == 2
    ids = ("query", pixels / "log", "--images", pixels / "images", "--ids", "4,1", "--name", "own")
    assert run(*ids, *small) == 0
    queries = diffhook.open_log(pixels / "log").queries
    assert sorted(set(queries["own"]["sample"])) == [1, 4]
    assert queries["made"].description["samples"]["seeds"] == [0, 1]
    assert queries["made"].description["objective"]["weighting"] == {"kind": "min_snr", "gamma": 5.0}


def test_images_are_cut_to_the_models_shape_in_their_middle() -> None:
    wide = np.zeros((8, 16, 3), np.uint8)
    wide[:, 4:12] = 255
    assert (to_pixels(wide, 3, (8, 8)) == 1).all()
    assert (to_pixels(wide.transpose(1, 0, 2), 3, (4, 8)) == 1).all()
    assert to_pixels(np.zeros((5, 9), np.uint8), 1, (4, 6)).shape == (1, 4, 6)


def test_an_array_of_inputs_comes_back_as_they_were(tmp_path: Path) -> None:
    values = np.stack([np.full((1, 8, 8), value, np.float32) for value in (-1, -0.01, 0, 0.5, 1)])
    np.save(tmp_path / "inputs.npy", values)
    pictures = Pictures(tmp_path / "inputs.npy", 1, (8, 8))
    np.testing.assert_allclose(torch.stack(list(pictures)), values, atol=1 / 255 + 1e-6)


def test_an_input_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    values = np.zeros((3, 1, 8, 8), np.float32)
    values[1, 0, 2, 2] = np.nan
    np.save(tmp_path / "inputs.npy", values)
    pictures = Pictures(tmp_path / "inputs.npy", 1, (8, 8))
    assert torch.isfinite(pictures[0]).all()
    with pytest.raises(ConfigurationError, match="image 1 has values that are NaN or infinite"):
        pictures[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{lora}/log", "--images", "{lora}/asked"], "name the pipeline that encodes them with --pipeline"),
        (["{lora}/log", "--images", "{lora}/asked", "--pipeline", "{lora}"], "no pipeline at {lora}"),
        (
            ["{lora}/log", "--images", "{lora}/asked", "--pipeline", "{lora}/pipeline"],
            "StableDiffusionPipeline takes captions",
        ),
        (
            ["{pixels}/log", "--images", "{lora}/asked", "--pipeline", "{lora}/pipeline", "--caption", "x"],
            "the run trained a diffusers.models.unets.unet_2d.UNet2DModel, the pipeline has a",
        ),
        (["{pixels}/log", "--images", "{pixels}/images", "--caption", "x"], "--caption needs --pipeline"),
        (
            ["{pixels}/log", "--images", "{pixels}/images", "--ids", "1,x"],
            "--ids is '1,x'; expected integers",
        ),
        (
            ["{pixels}/log", "--images", "{pixels}/images", "--ids", "1,9"],
            "query ids [9] are not among the 6",
        ),
        (
            ["{pixels}/log", "--images", "{pixels}/images", "--snr-gamma", "5"],
            "need --scheduler or --pipeline",
        ),
        (["{pixels}/log", "--images", "{pixels}/images", "--device", "abacus"], "--device abacus"),
        (["{pixels}/log", "--generate", "0"], "0 samples in 50 denoising steps"),
        (["{pixels}/log", "--generate", "1", "--snapshot", "9"], "has no snapshot of step 9; it has 2"),
        (["{pixels}/log"], "one of the arguments --images --generate is required"),
        (["{pixels}/log", "--images", "x", "--generate", "1"], "not allowed with argument"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    lora: Path, pixels: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [a.format(lora=lora, pixels=pixels) for a in arguments]
    assert run("query", *given, "--name", "bad") == 2
    shown = capsys.readouterr().err
    assert message.format(lora=lora, pixels=pixels) in shown.strip().splitlines()[-1]
    assert "Traceback" not in shown


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("few.txt", "one", "has 1 captions for 2 images"),
        ("bad.jsonl", '{"file_name": "0.png"}', 'expected "file_name" and "text" on every line'),
        ("some.jsonl", '{"file_name": "0.png", "text": "x"}', "has no caption for 1.png (1 such)"),
        (None, "", "no captions at"),
    ],
)
def test_captions_that_do_not_fit_are_named(
    lora: Path, tmp_path: Path, name: str | None, content: str, message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if name is not None:
        (tmp_path / name).write_text(content)
    file = tmp_path / (name or "none")
    status = run("query", lora / "log", "--images", lora / "asked", "--captions", file,
                 "--pipeline", lora / "pipeline", "--name", "bad")  # fmt: skip
    assert status == 2
    assert message in capsys.readouterr().err


def test_a_log_that_does_not_know_its_adapter_asks_for_it(lora: Path) -> None:
    log = diffhook.open_log(lora / "log")
    del log.config["identity"]["model"]["adapters"]
    with pytest.raises(ConfigurationError, match=r"which the model lacks: name the adapter's folder"):
        build_model(log, SavedPipeline(lora / "pipeline", "cpu"))
    with pytest.raises(ConfigurationError, match="which the model lacks"):
        build_model(log)
    log.config["identity"]["model"] = {"class": "several", "models": {"unet": {}, "text_encoder": {}}}
    with pytest.raises(ConfigurationError, match=r"several models \(unet, text_encoder\): pass model="):
        build_model(log)
    log = diffhook.open_log(lora / "log")
    with pytest.raises(ConfigurationError, match=r"were not trained \(an adapter\?\).*--pipeline"):
        build_model(log)
