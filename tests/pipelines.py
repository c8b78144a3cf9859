"""Tiny pipelines built from configurations, with a tokenizer of single letters, saved as diffusers does."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffhook.integrations.accelerate import DiffHook

SIZE = 16  # pixels; latents have half
CAPTIONS = ["a red cat", "two dogs", "the old house by the sea", "a cat on a mat"]
LORA = LoraConfig(
    r=2, lora_alpha=6, init_lora_weights="gaussian", target_modules=["to_q", "to_v", "to_out.0"]
)
_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def images(count: int = 4, seed: int = 0) -> Tensor:
    """(count, 3, SIZE, SIZE) in [−1, 1], exact in 8 bits."""
    pixels = torch.randint(0, 256, (count, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(seed))
    return pixels / 127.5 - 1


def tokenizer(folder: Path) -> Any:
    folder.mkdir(parents=True)
    letters = [letter + end for end in ("", "</w>") for letter in string.ascii_lowercase]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, "ca", "cat</w>"]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=12)


def clip(kind: Any, width: int) -> Any:
    config = CLIPTextConfig(
        vocab_size=56, hidden_size=width, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=12, projection_dim=10, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return kind(config).eval()


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=SIZE,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        shift_factor=0.1, scaling_factor=0.7,
    ).eval()  # fmt: skip


def _unet(width: int, **options: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIZE // 2, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), norm_num_groups=4, attention_head_dim=4,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=width, **options,
    ).eval()  # fmt: skip


def save_stable_diffusion(folder: Path) -> Path:
    torch.manual_seed(0)
    StableDiffusionPipeline(
        _vae(), clip(CLIPTextModel, 12), tokenizer(folder.parent / "tokenizer"), _unet(12),
        PNDMScheduler(skip_prk_steps=True, steps_offset=1, **_BETAS),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def save_stable_diffusion_xl(folder: Path) -> Path:
    torch.manual_seed(0)
    added: dict[str, Any] = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    added["projection_class_embeddings_input_dim"] = 10 + 6 * 4
    StableDiffusionXLPipeline(
        _vae(), clip(CLIPTextModel, 12), clip(CLIPTextModelWithProjection, 16),
        tokenizer(folder.parent / "tokenizer"), tokenizer(folder.parent / "tokenizer_2"),
        _unet(12 + 16, **added), EulerDiscreteScheduler(**_BETAS),
    ).save_pretrained(folder)  # fmt: skip
    return folder


class Captioned:
    """A dataset as the text-to-image scripts make it."""

    def __init__(self, pixels: Tensor, tokens: Tensor) -> None:
        self.pixels, self.tokens = pixels, tokens

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.pixels[index], "input_ids": self.tokens[index]}


def lora_run(root: Path) -> Path:
    """The folder, with a pipeline in it, and the log of a LoRA run on it without any objective."""
    save_stable_diffusion(root / "pipeline")
    train_lora(root / "pipeline", root / "log", projection_dim="full")
    return root


def train_lora(pipeline: Path, log: Path, **options: Any) -> nn.Module:
    """Four steps of a text-to-image LoRA loop with the hook attached. Returns the denoiser."""
    pipe = StableDiffusionPipeline.from_pretrained(pipeline)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    torch.manual_seed(1)
    for model in (pipe.unet, pipe.vae, pipe.text_encoder):
        model.requires_grad_(False)
    pipe.unet.add_adapter(LORA)
    tokens = pipe.tokenizer(
        CAPTIONS, max_length=12, padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    accelerator = Accelerator(cpu=True)
    DiffHook(accelerator, log, strict=True, snapshot_every=2, **options)
    optimizer = torch.optim.AdamW([p for p in pipe.unet.parameters() if p.requires_grad], 1e-2)
    loader = DataLoader(Captioned(images(), tokens), 2, shuffle=True)
    unet, optimizer, loader = accelerator.prepare(pipe.unet, optimizer, loader)
    for _ in range(2):
        for batch in loader:
            latents = pipe.vae.encode(batch["pixel_values"]).latent_dist.sample()
            latents = (latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
            text = pipe.text_encoder(batch["input_ids"], return_dict=False)[0]
            noise, timesteps = torch.randn_like(latents), torch.randint(0, 1000, (len(latents),))
            noisy = scheduler.add_noise(latents, noise, timesteps)
            predicted = unet(noisy, timesteps, text, return_dict=False)[0]
            accelerator.backward(F.mse_loss(predicted.float(), noise.float()))
            optimizer.step()
            optimizer.zero_grad()
    accelerator.end_training()
    return unet
