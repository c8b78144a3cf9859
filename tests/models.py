"""Small real models, and the batches and losses that go with them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from tests.twins import SampleLoss


class Problem(NamedTuple):
    model: nn.Module
    loss: SampleLoss
    batch: Any


def denoising_loss(model: nn.Module, batch: Any) -> Tensor:
    """(B,) mean squared error of the model's output against a fixed target."""
    inputs, target = batch
    prediction = model(**inputs, return_dict=True).sample
    return (prediction - target).square().flatten(1).mean(1)


def _images(batch: int, channels: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    noisy, target = torch.randn(2, batch, channels, size, size)
    return noisy, torch.randint(0, 1000, (batch,)), target


def unet(batch: int = 4) -> Problem:
    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=16,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=8,
    )
    noisy, timestep, target = _images(batch, 1, 16)
    return Problem(model, denoising_loss, ({"sample": noisy, "timestep": timestep}, target))


def conditional_unet(batch: int = 4) -> Problem:
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        norm_num_groups=8,
        attention_head_dim=8,
    )
    noisy, timestep, target = _images(batch, 4, 16)
    text = torch.randn(batch, 5, 24)
    inputs = {"sample": noisy, "timestep": timestep, "encoder_hidden_states": text}
    return Problem(model, denoising_loss, (inputs, target))


def dit(batch: int = 4) -> Problem:
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    )
    for module in model.modules():  # label dropout draws per batch: no twin could repeat it
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    noisy, timestep, target = _images(batch, 4, 8)
    labels = torch.randint(0, 10, (batch,))
    inputs = {"hidden_states": noisy, "timestep": timestep, "class_labels": labels}
    return Problem(model, denoising_loss, (inputs, target))


def lora_unet(batch: int = 4) -> Problem:
    problem = conditional_unet(batch)
    assert isinstance(problem.model, UNet2DConditionModel)
    with_lora(problem.model)
    return problem


def with_lora(model: UNet2DConditionModel) -> UNet2DConditionModel:
    """The model, frozen but for an adapter."""
    from peft import LoraConfig

    model.requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "conv1"]
    model.add_adapter(LoraConfig(r=4, init_lora_weights="gaussian", target_modules=targets))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at start, which would leave lora_A without a gradient
            nn.init.normal_(parameter, std=0.1)
    return model


PROBLEMS = {"unet": unet, "conditional_unet": conditional_unet, "dit": dit, "lora_unet": lora_unet}
