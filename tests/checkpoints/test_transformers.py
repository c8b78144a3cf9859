"""`diffhook checkpoints` and `diffhook query` on pipelines with transformers, trained wholly or by LoRA."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import FluxPipeline
from peft import get_peft_model_state_dict, inject_adapter_in_model
from PIL import Image
from torch import Tensor, nn

import diffhook
from diffhook.capture.checkpoints import read_lora
from diffhook.capture.checkpoints.weights import read_parameters
from diffhook.capture.model.adapter import add_adapters
from diffhook.capture.model.pipeline import SavedPipeline
from diffhook.capture.objective.noise import noise_bank, noise_seed
from diffhook.cli import main
from diffhook.errors import ConfigurationError
from tests import denoisers, script_twins
from tests.pipelines import CAPTIONS, LORA, SIZE, images
from tests.twins import sample_gradients

COUNT = 4
FLOWS = ("stable-diffusion-3", "flux")
TOLD = ("--resolution", SIZE, "--max-sequence-length", denoisers.TOKENS)


class Case(NamedTuple):
    save: Callable[[Path], Path]
    twin: type[script_twins.Twin]
    packed: Callable[[Tensor], Tensor] = lambda latents: latents


CASES = {
    "dit": Case(denoisers.save_dit, script_twins.DiT),
    "pixart": Case(denoisers.save_pixart, script_twins.PixArt),
    "stable-diffusion-3": Case(denoisers.save_stable_diffusion_3, script_twins.StableDiffusion3),
    "flux": Case(
        denoisers.save_flux,
        script_twins.Flux,
        lambda latents: FluxPipeline._pack_latents(latents, *latents.shape),
    ),
}


def run(*arguments: Any) -> int:
    return main([str(a) for a in arguments])


def trained(name: str, folder: Path, step: int) -> Any:
    """The denoiser as it is at a step: DiT trained as a whole, others by LoRA."""
    pipe = SavedPipeline(folder, "cpu").pipe
    torch.manual_seed(step)
    if name != "dit":
        pipe.transformer.requires_grad_(False)
        inject_adapter_in_model(LORA, pipe.transformer)  # PixArt's has no add_adapter
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return pipe.transformer.eval()


def save_checkpoint(name: str, folder: Path, out: Path, step: int) -> None:
    model = trained(name, folder, step)
    if name == "dit":
        model.save_pretrained(out / f"checkpoint-{step}/transformer")
        return
    weights = get_peft_model_state_dict(model)
    if name == "pixart":  # as peft names them, without peft's configuration beside them
        out.mkdir(exist_ok=True)
        named = {f"base_model.model.{key}": value.contiguous() for key, value in weights.items()}
        safetensors.torch.save_file(named, out / f"checkpoint-{step}.safetensors")
    else:
        kind = type(SavedPipeline(folder, "cpu").pipe)
        kind.save_lora_weights(out / f"checkpoint-{step}", transformer_lora_layers=weights)


def save_images(folder: Path) -> None:
    """In folders of two classes; sorted, classes take turns in the samples of the twins, too."""
    for index, picture in enumerate(images(COUNT)):
        path = folder / f"class-{index // 2}/{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        array = ((picture + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(array).save(path)


@pytest.mark.parametrize("name", CASES)
def test_checkpoints_and_queries_are_those_of_the_training_script(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case, log, data = CASES[name], tmp_path / "log", tmp_path / "data"
    folder = case.save(tmp_path / "pipeline")
    for step in (1, 2):
        save_checkpoint(name, folder, tmp_path / "out", step)
    save_images(data)
    (tmp_path / "captions.txt").write_text("\n".join(CAPTIONS) + "\n")
    told: tuple[Any, ...] = ("--pipeline", folder)
    if name != "dit":
        told += ("--captions", tmp_path / "captions.txt")
    measured = ("--checkpoints", tmp_path / "out/checkpoint-*", "--data", data, "--lora-alpha", 6)
    grid = ("--timesteps", 2, "--replicates", 1, "--projection-dim", 64)
    chosen = () if name == "dit" else TOLD  # the log keeps it: queries need no word
    assert run("checkpoints", log, *told, *chosen, *measured, *grid) == 0, capsys.readouterr()
    labels = () if name != "dit" else ("--class-labels", "0,0,1,1")
    assert run("query", log, "--images", data, "--name", "own", *told, *labels) == 0, capsys.readouterr()

    opened, twin = diffhook.open_log(log), case.twin(folder)
    rows, asked = opened.probe, opened.queries["own"]
    assert len(rows) == len(asked) == COUNT * 2 * 2
    latents, conditions = twin.latents(images(COUNT)), twin.told(CAPTIONS)
    if name == "dit":
        conditions = {"labels": torch.tensor([0, 0, 1, 1])}
    models = {step: trained(name, folder, step) for step in (1, 2)}
    for table in (rows, asked):
        for row in (0, 5, 10, 15):
            sample, step = int(table["sample"][row]), int(table["step"][row])
            timestep = table["timestep"][row].item()
            seed = noise_seed(0, timestep, 0)
            assert int(table["noise_seed"][row]) == seed
            own = slice(sample, sample + 1)
            drawn = noise_bank(torch.tensor([seed]), case.packed(latents[own]))
            number = timestep if name in FLOWS else int(timestep)
            batch = {
                "latents": latents[own],
                "noise": twin.noise(drawn, latents),
                "timesteps": torch.tensor([number]),
                **{key: value[own] for key, value in conditions.items()},
            }
            gradient = sample_gradients(models[step], twin.loss, batch)[0]
            np.testing.assert_allclose(table["grad_norm"][row], float(gradient.norm()), rtol=2e-4)
    orders = [np.lexsort([table[c] for c in ("sample", "timestep", "step")]) for table in (rows, asked)]
    both = [table["projection"][order] for table, order in zip((rows, asked), orders, strict=True)]
    np.testing.assert_allclose(both[0], both[1], atol=2e-3)  # of float16
    assert run("influence", log, "--queries", "own") == 0


@pytest.fixture
def flux(tmp_path: Path) -> Path:
    """A pipeline, the log of two of its images with choices of the training's own, and how to ask it."""
    folder = denoisers.save_flux(tmp_path / "pipeline")
    save_checkpoint("flux", folder, tmp_path / "out", 1)
    save_images(tmp_path / "data")
    chosen = ("--resolution", SIZE, "--max-sequence-length", 7, "--guidance-scale", 2)
    assert run(
        "checkpoints", tmp_path / "log", "--pipeline", folder, "--checkpoints", tmp_path / "out/checkpoint-*",
        "--data", tmp_path / "data", "--caption", "a cat", "--weighting", "sigma_sqrt", *chosen,
        "--timesteps", 2, "--replicates", 1, "--projection-dim", 64, "--lora-alpha", 6,
    ) == 0  # fmt: skip
    return tmp_path


def asked(root: Path, *more: Any) -> int:
    return run(
        "query", root / "log", "--pipeline", root / "pipeline", "--images", root / "data",
        "--caption", "a cat", "--name", "own", *more,
    )  # fmt: skip


def test_the_log_keeps_what_the_training_chose(flux: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = diffhook.open_log(flux / "log")
    chosen = {"resolution": SIZE, "max_sequence_length": 7, "guidance_scale": 2.0}
    assert log.config["identity"]["pipeline"] == chosen
    assert asked(flux, "--guidance-scale", 2) == 0  # the same may be said
    assert "another loss" not in caplog.text
    rows, own = log.probe, log.refresh().queries["own"]
    assert own.description["objective"]["weighting"] == {"kind": "sigma_power", "power": -2.0}
    orders = [np.lexsort([table[c] for c in ("sample", "timestep")]) for table in (rows, own)]
    norms = [table["grad_norm"][order] for table, order in zip((rows, own), orders, strict=True)]
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-5)


@pytest.mark.parametrize(
    ("option", "value", "measured"),
    [("resolution", 32, SIZE), ("max-sequence-length", 8, 7), ("guidance-scale", 3.5, 2.0)],
)
def test_another_choice_is_refused(
    option: str, value: float, measured: float, flux: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert asked(flux, f"--{option}", value) == 2
    why = f"--{option} is {value}, and the log's samples were measured with {measured}: leave it out"
    assert why in capsys.readouterr().err
    options: dict[str, Any] = {"resolution": SIZE, "max_sequence_length": 7, "guidance_scale": 2.0}
    pipeline = SavedPipeline(flux / "pipeline", "cpu", **{**options, option.replace("-", "_"): value})
    batch = pipeline.encode(images(), ["a cat"] * 4)
    name = option.replace("-", "_")
    with pytest.raises(ConfigurationError, match=rf"pass SavedPipeline\(…, {name}={measured}\)"):
        diffhook.query(flux / "log", batch, "other", pipeline=pipeline, model=pipeline.denoiser)
    assert not diffhook.open_log(flux / "log").queries


def test_another_loss_is_told(flux: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert asked(flux, "--weighting", "uniform") == 0
    assert "another loss than the log's: weighting.kind: the log has 'sigma_power'" in caplog.text


def kohya_flux(path: Path) -> None:
    """A LoRA as kohya's flux_train_network.py saves it, on fused layers of the tiny model."""
    tensors = {}
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "double_blocks_0_img_attn_qkv": (48, 16),
        "double_blocks_0_txt_attn_qkv": (48, 16),
        "double_blocks_0_img_attn_proj": (16, 16),
        "double_blocks_0_img_mlp_0": (64, 16),
        "single_blocks_0_linear2": (16, 80),
    }
    for layer, (out, inward) in shapes.items():
        tensors[f"lora_unet_{layer}.lora_down.weight"] = torch.randn(2, inward, generator=generator)
        tensors[f"lora_unet_{layer}.lora_up.weight"] = torch.randn(out, 2, generator=generator)
        tensors[f"lora_unet_{layer}.alpha"] = torch.tensor(1.0)
    safetensors.torch.save_file(tensors, path)


@torch.no_grad()
def test_a_flux_lora_of_kohyas_scripts_is_the_one_that_diffusers_loads(tmp_path: Path) -> None:
    folder, file = denoisers.save_flux(tmp_path / "pipeline"), tmp_path / "kohya-000001.safetensors"
    kohya_flux(file)
    pipeline = SavedPipeline(folder, "cpu", resolution=SIZE, max_sequence_length=denoisers.TOKENS)
    batch, objective = pipeline.encode(images(), CAPTIONS), pipeline.objective()
    timesteps = torch.tensor(objective.schedule([100, 400, 600, 900]))
    seeds = torch.arange(4)

    def predicted(model: nn.Module) -> Tensor:
        return objective.predict(model, batch, timesteps, seeds).output

    plain = predicted(pipeline.denoiser)
    add_adapters(pipeline.denoiser, read_lora([file], pipeline.denoiser))
    names = {n: list(p.shape) for n, p in pipeline.denoiser.named_parameters() if "lora_" in n}
    values = read_parameters([file], names)
    assert len(values) == 2 * (3 + 3 + 1 + 1 + 1)
    pipeline.denoiser.load_state_dict(values, strict=False)
    own = predicted(pipeline.denoiser)
    theirs = SavedPipeline(folder, "cpu").pipe
    theirs.load_lora_weights(file)
    torch.testing.assert_close(own, predicted(theirs.transformer.eval()))
    assert not torch.allclose(own, plain, atol=1e-2)


def test_what_a_pipeline_is_not_trained_with_leaves_no_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wan").mkdir()
    index = {"_class_name": "WanPipeline", "_diffusers_version": "0.42.1"}
    (tmp_path / "wan/model_index.json").write_text(json.dumps(index))
    (tmp_path / "checkpoint-1.safetensors").touch()
    save_images(tmp_path / "data")
    measured = ("--checkpoints", tmp_path / "checkpoint-1.safetensors", "--data", tmp_path / "data")
    assert run("checkpoints", tmp_path / "log", "--pipeline", tmp_path / "wan", *measured) == 2
    assert "holds a WanPipeline (it is trained on videos" in capsys.readouterr().err
    dit = denoisers.save_dit(tmp_path / "dit")
    asked = ("--pipeline", dit, *measured, "--guidance-scale", 2)
    assert run("checkpoints", tmp_path / "log", *asked) == 2
    assert "a DiTPipeline is not trained with a guidance_scale" in capsys.readouterr().err
    assert not (tmp_path / "log").exists()
