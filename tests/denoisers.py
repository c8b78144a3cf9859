"""Tiny pipelines with transformers, built from configurations, with tokenizers of single letters."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import nn
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from tests.pipelines import SIZE, clip, tokenizer

WIDTH = 16  # of T5
LATENTS = 4  # channels
TOKENS = 14  # of a caption
_HEADS: dict[str, int] = {"num_attention_heads": 2, "attention_head_dim": 8}


def t5() -> T5EncoderModel:
    config = T5Config(vocab_size=40, d_model=WIDTH, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    return T5EncoderModel(config).eval()


def words() -> T5Tokenizer:
    letters = [(mark + letter, -2.0) for mark in ("", "▁") for letter in ("", *string.ascii_lowercase)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *letters[1:]]
    return T5Tokenizer(vocab=pieces[:40], extra_ids=0)


def vae(channels: int = LATENTS) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=channels, sample_size=SIZE,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        shift_factor=0.1, scaling_factor=0.7,
    ).eval()  # fmt: skip


def awake(model: nn.Module) -> Any:
    """With no parameter at zero: what begins so has gradients that tell nothing."""
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return model.eval()


def save_dit(folder: Path) -> Path:
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        **_HEADS, in_channels=LATENTS, out_channels=2 * LATENTS, num_layers=2, sample_size=SIZE // 2,
        norm_num_groups=4, num_embeds_ada_norm=5,
    )  # fmt: skip
    scheduler = DDIMScheduler(beta_schedule="linear")
    DiTPipeline(awake(model), vae(), scheduler).save_pretrained(folder)
    return folder


def save_pixart(folder: Path, kind: Any = PixArtAlphaPipeline, **options: Any) -> Path:
    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        **_HEADS, in_channels=LATENTS, out_channels=2 * LATENTS, num_layers=2, sample_size=SIZE // 2,
        norm_num_groups=4, cross_attention_dim=16, caption_channels=WIDTH, **options,
    )  # fmt: skip
    kind(words(), t5(), vae(), awake(model), DPMSolverMultistepScheduler()).save_pretrained(folder)
    return folder


def save_pixart_told_sizes(folder: Path) -> Path:
    """As the pipeline has it: models for latents of 128 are told the images' size."""
    heads = {"num_attention_heads": 3, "attention_head_dim": 8}
    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        **heads, in_channels=LATENTS, out_channels=2 * LATENTS, num_layers=1, sample_size=128,
        norm_num_groups=4, cross_attention_dim=24, caption_channels=WIDTH,
    )  # fmt: skip
    pipe = PixArtAlphaPipeline(words(), t5(), vae(), awake(model), DPMSolverMultistepScheduler())
    pipe.save_pretrained(folder)
    return folder


def save_pixart_sigma(folder: Path) -> Path:
    return save_pixart(folder, PixArtSigmaPipeline, use_additional_conditions=False)


def save_stable_diffusion_3(folder: Path) -> Path:
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        **_HEADS, sample_size=SIZE // 2, patch_size=2, in_channels=LATENTS, out_channels=LATENTS,
        num_layers=2, joint_attention_dim=WIDTH, caption_projection_dim=16, pooled_projection_dim=20,
        pos_embed_max_size=8, qk_norm="rms_norm", dual_attention_layers=(0,),
    )  # fmt: skip
    two = [clip(CLIPTextModelWithProjection, 8) for _ in range(2)]
    tokens = [tokenizer(folder.parent / f"tokenizer_{n}") for n in range(2)]
    StableDiffusion3Pipeline(
        awake(model), FlowMatchEulerDiscreteScheduler(shift=3.0), vae(), two[0], tokens[0], two[1], tokens[1],
        t5(), words(),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def save_flux(folder: Path, guidance: bool = True) -> Path:
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        **_HEADS, in_channels=4 * LATENTS, num_layers=1, num_single_layers=1, joint_attention_dim=WIDTH,
        pooled_projection_dim=12, guidance_embeds=guidance, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    FluxPipeline(
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae(), clip(CLIPTextModel, 12),
        tokenizer(folder.parent / "tokenizer"), t5(), words(), awake(model),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def save_aura_flow(folder: Path) -> Path:
    torch.manual_seed(0)
    model = AuraFlowTransformer2DModel(
        sample_size=SIZE // 2, patch_size=2, in_channels=LATENTS, num_mmdit_layers=1, num_single_dit_layers=1,
        attention_head_dim=8, num_attention_heads=2, joint_attention_dim=WIDTH, caption_projection_dim=16,
        out_channels=LATENTS, pos_embed_max_size=16,
    )  # fmt: skip
    AuraFlowPipeline(
        words(), t5(), vae(), awake(model), FlowMatchEulerDiscreteScheduler(shift=1.73)
    ).save_pretrained(folder)
    return folder


def save_sana(folder: Path) -> Path:
    torch.manual_seed(0)
    model = SanaTransformer2DModel(
        **_HEADS, patch_size=1, in_channels=LATENTS, out_channels=LATENTS, num_layers=1,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16,
        caption_channels=WIDTH, sample_size=SIZE // 2,
    )  # fmt: skip
    deep = AutoencoderDC(
        in_channels=3, latent_channels=LATENTS, attention_head_dim=2, encoder_block_types=("ResBlock",) * 2,
        decoder_block_types=("ResBlock",) * 2, encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), downsample_block_type="conv",
        upsample_block_type="interpolate", decoder_norm_types="rms_norm", decoder_act_fns="silu",
        scaling_factor=0.4,
    )  # fmt: skip
    text = Gemma2Model(Gemma2Config(
        vocab_size=40, hidden_size=WIDTH, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8,
    ))  # fmt: skip
    sampler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    SanaPipeline(words(), text.eval(), deep.eval(), awake(model), sampler).save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "SanaPipeline"
    return folder
