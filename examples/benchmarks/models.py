"""The models that capture is measured on, built from configurations; on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]  # what LoRA adapts
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Case:
    """A model, the arguments of one call, and the target of its output."""

    name: str
    model: nn.Module
    inputs: dict[str, Tensor]
    target: Tensor
    autocast: torch.dtype | None = None

    def losses(self, rows: slice = slice(None)) -> Tensor:
        """(B,) mean squared errors of the given samples."""
        inputs = {name: value[rows] for name, value in self.inputs.items()}
        with torch.autocast(DEVICE, self.autocast, enabled=self.autocast is not None):
            predicted = self.model(**inputs, return_dict=False)[0]
        return (predicted - self.target[rows]).square().flatten(1).mean(1)

    @property
    def batch(self) -> int:
        return len(self.target)

    @property
    def size(self) -> int:
        """Number of trainable parameters."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)


def _case(name: str, model: nn.Module, batch: int, channels: int, size: int, **extra: Tensor) -> Case:
    noisy, target = torch.randn(2, batch, channels, size, size)
    first = "hidden_states" if isinstance(model, DiTTransformer2DModel) else "sample"
    inputs = {first: noisy, "timestep": torch.randint(0, 1000, (batch,)), **extra}
    inputs = {key: value.to(DEVICE) for key, value in inputs.items()}
    return Case(name, model.to(DEVICE), inputs, target.to(DEVICE))


def digits_unet() -> UNet2DModel:
    """For MNIST digits: 0.9 M parameters, three resolutions, attention at the lowest."""
    return UNet2DModel(
        sample_size=28,
        in_channels=1,
        out_channels=1,
        block_out_channels=(24, 48, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=16,
    )


def small_unet(batch: int = 32) -> Case:
    model = UNet2DModel(
        sample_size=32,
        block_out_channels=(32, 64, 128),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    )
    return _case("UNet2DModel", model, batch, 3, 32)


def large_unet(batch: int = 8) -> Case:
    model = UNet2DModel(
        sample_size=32,
        block_out_channels=(64, 128, 256, 256),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    )
    return _case("UNet2DModel", model, batch, 3, 32)


def dit(batch: int = 32, *, heads: int = 4, width: int = 32, layers: int = 4, size: int = 16) -> Case:
    model = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=width,
        in_channels=4,
        num_layers=layers,
        sample_size=size,
        patch_size=2,
        num_embeds_ada_norm=10,
    )
    for module in model.modules():  # label dropout draws per batch: nothing could be compared
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    return _case("DiT", model, batch, 4, size, class_labels=torch.randint(0, 10, (batch,)))


def lora(batch: int = 16) -> Case:
    from peft import LoraConfig

    model: Any = UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(64, 128),
        layers_per_block=1,
        cross_attention_dim=64,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=8, init_lora_weights="gaussian", target_modules=ATTENTION))
    text = torch.randn(batch, 16, 64)
    return _case("LoRA r=8", model, batch, 4, 32, encoder_hidden_states=text)


def wide_unet(batch: int = 32) -> Case:
    model = UNet2DModel(
        sample_size=32,
        block_out_channels=(128, 256, 256, 512),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )
    return _case("UNet2DModel", model, batch, 3, 32)


def dit_small(batch: int = 64) -> Case:
    """DiT-S/2."""
    return dit(batch, heads=6, width=64, layers=12, size=32)


def dit_block(heads: int, width: int, batch: int) -> Callable[[], Case]:
    """One block over 256 tokens, as a whole DiT of the width has many."""

    def made() -> Case:
        case = dit(batch, heads=heads, width=width, layers=1, size=32)
        case.name = f"DiT, one block of width {heads * width}"
        return case

    return made


def stable_diffusion(rank: int | None, batch: int = 2) -> Case:
    """The UNet of SD 1.5, on latents of 16 × 16."""
    model: Any = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    if rank is not None:
        from peft import LoraConfig

        model.requires_grad_(False)
        model.add_adapter(LoraConfig(r=rank, init_lora_weights="gaussian", target_modules=ATTENTION))
    how = "whole" if rank is None else f"LoRA r={rank}"
    text = torch.randn(batch, 77, 768)
    return _case(f"UNet of SD 1.5, {how}", model, batch, 4, 16, encoder_hidden_states=text)


def _in_bf16(make: Callable[[], Case]) -> Callable[[], Case]:
    def made() -> Case:
        case = make()
        case.name, case.autocast = f"{case.name}, bf16", torch.bfloat16
        return case

    return made


CASES: dict[str, Callable[[], Case]] = {
    "small_unet": small_unet,
    "large_unet": large_unet,
    "dit": dit,
    "lora": lora,
}
#: too large, or too much alike, for the table of all methods
LARGE: dict[str, Callable[[], Case]] = {
    "dit_block_384": dit_block(6, 64, 16),
    "dit_block_1024": dit_block(16, 64, 8),
    "dit_block_1152": dit_block(16, 72, 8),
    "sd15_lora": partial(stable_diffusion, 8),
    "sd15_whole": partial(stable_diffusion, None),
}
if DEVICE == "cuda":  # sizes that would take a processor minutes a pass
    CASES |= {"wide_unet": wide_unet, "dit_small": dit_small}
    CASES |= {f"{name}_bf16": _in_bf16(make) for name, make in CASES.items()}
