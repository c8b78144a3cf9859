"""Real models of their real sizes, from their configurations, on meta tensors: no number is ever computed.

Those that are trained in half precision are in bfloat16 as a whole, the smaller UNets in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


@dataclass
class Configuration:
    """A model and the arguments of one training call."""

    title: str
    model: nn.Module
    inputs: dict[str, Any]

    def loss(self) -> Tensor:
        """Of the output's shape, without a target: a mean of squares, as in training."""
        predicted: Tensor = self.model(**self.inputs, return_dict=False)[0]
        return predicted.float().square().mean()


def _made(kind: Any, rank: int | None, dtype: torch.dtype = torch.bfloat16, **config: Any) -> nn.Module:
    """Wholly trained, or with LoRA of a rank on the attention layers."""
    with torch.device("meta"):
        model = kind(**config).to(dtype)
        if rank is not None:
            model.requires_grad_(False)
            inject_adapter_in_model(LoraConfig(r=rank, target_modules=ATTENTION), model)
    return model.train()  # type: ignore[no-any-return]


def _random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _steps(batch: int) -> Tensor:
    return torch.empty(batch, dtype=torch.int64, device="meta")


def stable_diffusion(rank: int | None, batch: int = 4) -> Configuration:
    model = _made(diffusers.UNet2DConditionModel, rank, sample_size=64, cross_attention_dim=768)
    inputs = {
        "sample": _random(batch, 4, 64, 64),
        "timestep": _steps(batch),
        "encoder_hidden_states": _random(batch, 77, 768),
    }
    return Configuration(f"SD 1.5, {_how(rank)}, batch {batch}", model, inputs)


def sdxl(rank: int | None, batch: int = 2) -> Configuration:
    model = _made(
        diffusers.UNet2DConditionModel,
        rank,
        sample_size=128,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(320, 640, 1280),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    inputs = {
        "sample": _random(batch, 4, 128, 128),
        "timestep": _steps(batch),
        "encoder_hidden_states": _random(batch, 77, 2048),
        "added_cond_kwargs": {"text_embeds": _random(batch, 1280), "time_ids": _random(batch, 6)},
    }
    return Configuration(f"SDXL, {_how(rank)}, batch {batch}", model, inputs)


def dit(rank: int | None, batch: int = 16, **config: Any) -> Configuration:
    """DiT-XL/2, unless ``config`` says otherwise."""
    model = _made(diffusers.DiTTransformer2DModel, rank, **config)
    for module in model.modules():
        if hasattr(module, "dropout_prob"):  # reads values
            module.dropout_prob = 0.0
    inputs = {
        "hidden_states": _random(batch, 4, 32, 32),
        "timestep": _steps(batch),
        "class_labels": _steps(batch),
    }
    return Configuration(f"DiT-XL/2, {_how(rank)}, batch {batch}", model, inputs)


def pixart(rank: int | None, batch: int = 8) -> Configuration:
    model = _made(
        diffusers.PixArtTransformer2DModel,
        rank,
        sample_size=64,
        cross_attention_dim=1152,
        caption_channels=4096,
        use_additional_conditions=False,
    )
    inputs = {
        "hidden_states": _random(batch, 4, 64, 64),
        "encoder_hidden_states": _random(batch, 120, 4096),
        "timestep": _steps(batch),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    return Configuration(f"PixArt-α, {_how(rank)}, batch {batch}", model, inputs)


def sd3(rank: int | None, batch: int = 2) -> Configuration:
    model = _made(
        diffusers.SD3Transformer2DModel,
        rank,
        num_layers=24,
        num_attention_heads=24,
        caption_projection_dim=1536,
        pos_embed_max_size=192,
    )
    inputs = {
        "hidden_states": _random(batch, 16, 128, 128),
        "encoder_hidden_states": _random(batch, 154, 4096),
        "pooled_projections": _random(batch, 2048),
        "timestep": _steps(batch),
    }
    return Configuration(f"SD3 medium, {_how(rank)}, batch {batch}", model, inputs)


def flux(rank: int | None, batch: int = 1) -> Configuration:
    model = _made(diffusers.FluxTransformer2DModel, rank)
    inputs = {
        "hidden_states": _random(batch, 4096, 64),
        "encoder_hidden_states": _random(batch, 512, 4096),
        "pooled_projections": _random(batch, 768),
        "timestep": _random(batch),
        "img_ids": _random(4096, 3),
        "txt_ids": _random(512, 3),
    }
    return Configuration(f"FLUX.1, {_how(rank)}, batch {batch}", model, inputs)


def unet2d(name: str, widths: tuple[int, ...], batch: int, size: int = 32) -> Configuration:
    """An unconditional UNet like google/ddpm-cifar10-32, of these widths, in float32."""
    model = _made(
        diffusers.UNet2DModel,
        None,
        torch.float32,
        sample_size=size,
        block_out_channels=widths,
        layers_per_block=2,
        attention_head_dim=None,
        downsample_padding=0,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )
    inputs = {"sample": _random(batch, 3, size, size, dtype=torch.float32), "timestep": _steps(batch)}
    return Configuration(f"{name}, full, batch {batch}", model, inputs)


def _how(rank: int | None) -> str:
    return "full" if rank is None else f"LoRA r={rank}"


CONFIGURATIONS: dict[str, Callable[[], Configuration]] = {
    "sd15_lora": lambda: stable_diffusion(8),
    "sd15": lambda: stable_diffusion(None),
    "sdxl_lora": lambda: sdxl(8),
    "dit_xl": lambda: dit(None),
    "pixart_lora": lambda: pixart(16),
    "pixart": lambda: pixart(None),
    "sd3_lora": lambda: sd3(16),
    "flux_lora": lambda: flux(16),
    "ddpm_cifar10": lambda: unet2d("ddpm-cifar10", (128, 256, 256, 256), 16),
    "unet_133m": lambda: unet2d("UNet 132 M", (128, 256, 576, 640), 16, size=64),
}
