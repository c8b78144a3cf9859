"""Queries on logs of networks that a trainer puts on a model, by the pipeline that it was put on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn

import diffhook
from diffhook.capture.objective.noise import noise_bank
from diffhook.cli import main
from diffhook.errors import ConfigurationError
from diffhook.gradients import Sketch
from diffhook.queries.rebuilt import build_model
from tests import networks
from tests.networks import KINDS, Lora, Network, load, put_on, train_network
from tests.pipelines import images, save_stable_diffusion
from tests.twins import projected

ASKED = images(2, seed=5)
TEXTS = ["a cat", "the red sea"]
CASES = [(kind, False) for kind in KINDS] + [("LoRA", True)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline, and images with captions to ask about."""
    place = tmp_path_factory.mktemp("as-trained")
    save_stable_diffusion(place / "pipeline")
    (place / "asked").mkdir()
    for index, picture in enumerate(ASKED):
        array = ((picture + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(array).save(place / f"asked/{index}.png")
    (place / "asked.txt").write_text("\n".join(TEXTS) + "\n")
    return place


def ask(root: Path, log: Path, *more: Any) -> int:
    images = ("--images", root / "asked", "--captions", root / "asked.txt")
    grid = ("--timesteps", 2, "--draws", 1, "--replicates", 1)
    command = ("query", log, *images, *grid, "--name", "mine", "--pipeline", root / "pipeline", *more)
    return main([str(word) for word in command])


class _Twin(nn.Module):
    """The trainer's own network at a snapshot, in float64, and what it is put on."""

    def __init__(self, root: Path, kind: str, snapshot: Any, *, text: bool) -> None:
        super().__init__()
        pipe = load(root / "pipeline")
        self.network: Network = put_on(pipe, kind, text=text)
        self.network.load_state_dict(safetensors.torch.load(snapshot.parameters()), strict=False)
        self.unet, self.text, self.vae, self.words = pipe.unet, pipe.text_encoder, pipe.vae, pipe.tokenizer
        self.double().eval()

    def gradient(self, image: Tensor, text: str, timestep: float, seed: int) -> Tensor:
        """(P,) of one sample's loss over the network's parameters, in its order."""
        tokens = self.words([text], padding="max_length", max_length=12, return_tensors="pt").input_ids
        with torch.no_grad():
            latents = (self.vae.encode(image[None].double()).latent_dist.mean - 0.1) * 0.7
        noise = noise_bank(torch.tensor([seed]), latents)
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float32) ** 2
        kept = (1 - betas).cumprod(0)[int(timestep)].double()
        noisy = kept.sqrt() * latents + (1 - kept).sqrt() * noise
        out = self.unet(noisy, torch.tensor([int(timestep)]), self.text(tokens)[0]).sample
        shares = torch.autograd.grad((out - noise).square().mean(), list(self.network.parameters()))
        return torch.cat([share.flatten() for share in shares])


@pytest.mark.parametrize(("kind", "text"), CASES)
def test_queries_are_the_networks_own_batch_1_gradients_in_the_logs_coordinates(
    kind: str, text: bool, root: Path, tmp_path: Path
) -> None:
    network = train_network(root / "pipeline", tmp_path / "log", kind, text=text, projection_dim=256)
    assert ask(root, tmp_path / "log") == 0
    log = diffhook.open_log(tmp_path / "log")
    names = {name: parameter.shape for name, parameter in network.named_parameters()}
    assert log.config["identity"]["parameters"] == [[name, list(shape)] for name, shape in names.items()]
    twin, sketch = _Twin(root, kind, log.snapshots[-1], text=text), Sketch(256, names)
    rows = log.queries["mine"]
    columns = [rows[name].tolist() for name in ("sample", "timestep", "noise_seed", "grad_norm")]
    for sample, timestep, seed, norm, unit in zip(*columns, rows["projection"], strict=True):
        expected = twin.gradient(ASKED[sample], TEXTS[sample], timestep, seed)
        assert norm == pytest.approx(float(expected.norm()), rel=1e-5)
        direction = projected(sketch, twin.network, expected[None])[0] / expected.norm()
        np.testing.assert_allclose(unit.astype(np.float64), direction.numpy(), atol=2e-3)


def test_scale_comes_from_the_trainings_file_where_the_log_does_not_tell_it(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffhook.capture.model.adapter._alphas", lambda model: {})
    network = train_network(root / "pipeline", tmp_path / "log", "LoHa", projection_dim=16)
    monkeypatch.undo()
    assert ask(root, tmp_path / "log") == 2
    assert "does not tell the α of its adapter" in capsys.readouterr().err
    assert ask(root, tmp_path / "log", "--lora", network.save(tmp_path / "it.safetensors")) == 0
    told = train_network(root / "pipeline", tmp_path / "told", "LoHa", projection_dim=16)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), told.parameters(), strict=True))
    assert ask(root, tmp_path / "told") == 0
    found, expected = (diffhook.open_log(tmp_path / name).queries["mine"] for name in ("log", "told"))
    np.testing.assert_array_equal(found["grad_norm"], expected["grad_norm"])


def test_its_model_generates_what_is_asked_about(root: Path, tmp_path: Path) -> None:
    train_network(root / "pipeline", tmp_path / "log", "LoRA", text=True, projection_dim=16)
    command = ("query", tmp_path / "log", "--pipeline", root / "pipeline", "--generate", 2, "--steps", 2,
               "--caption", "a cat", "--save", tmp_path / "made", "--timesteps", 1, "--name")  # fmt: skip
    assert main([str(word) for word in (*command, "made")]) == 0
    log = diffhook.open_log(tmp_path / "log")
    assert len(set(log.queries["made"]["grad_norm"].tolist())) == len(log.queries["made"])
    with pytest.raises(ConfigurationError, match="name the pipeline with that model"):
        build_model(log)


class _Dora(Lora):
    """With a trained scale beside the factors."""

    def make(self, out: int, inward: int, kernel: list[int]) -> None:
        super().make(out, inward, kernel)
        self.dora_scale = nn.Parameter(torch.ones(out))

    def forward(self, inputs: Tensor) -> Tensor:
        axes = (1, 1) if inputs.dim() == 4 else ()
        return super().forward(inputs) * self.dora_scale.view(-1, *axes)


@pytest.mark.parametrize(
    ("patched", "value", "told"),
    [
        ("KINDS", KINDS | {"LoRA": _Dora}, r"has 'lora_unet_\w+.dora_scale' \(28 such\), which cannot be"),
        ("DENOISER", "lora_unet_far_", "has no layers such as 'lora_unet_far_"),
    ],
)
def test_what_peft_cannot_make_is_refused_by_name(
    patched: str, value: Any, told: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(networks, patched, value)
    train_network(root / "pipeline", tmp_path / "log", "LoRA", projection_dim=16)
    pipeline = diffhook.SavedPipeline(root / "pipeline", "cpu")
    with pytest.raises(ConfigurationError, match=told):
        build_model(diffhook.open_log(tmp_path / "log"), pipeline)
