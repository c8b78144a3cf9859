"""Training loops as users write them, each with its loss for a batch-size-1 twin.

A batch is a dict of tensors with the sample axis in front: "clean", "noise", "timesteps", and what
the case conditions on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.models import conditional_unet, lora_unet, with_lora
from tests.runs import SCHEDULER, TinyDenoiser

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """What one kind of script does.

    Attributes:
        models: makes the trained models; one alone is called as it is, several come as a ModuleDict.
        losses: (model or models, batch) → (B,) losses, weights included.
        image: shape of a clean sample.
        extra: B → what else a batch holds.
        plain: the loss is a mean of squared errors, so that samples' own losses can be read off.
    """

    models: Callable[[], dict[str, nn.Module]]
    losses: Callable[[Any, Batch], Tensor]
    image: tuple[int, ...] = (1, 8, 8)
    extra: Callable[[int], Batch] = lambda count: {}
    plain: bool = True


def mse(predicted: Tensor, target: Tensor) -> Tensor:
    return (
        (predicted.float() - target.float()).square().flatten(1).mean(1)
        if (predicted.dtype != torch.float64)
        else (predicted - target).square().flatten(1).mean(1)
    )


def _noisy(batch: Batch) -> Tensor:
    return SCHEDULER.add_noise(batch["clean"], batch["noise"], batch["timesteps"])


def _tiny() -> dict[str, nn.Module]:
    return {"unet": TinyDenoiser()}


# ── what is predicted, and how the loss weighs it ─────────────────────────────────────────────────


def _predicting(kind: str) -> Callable[[Any, Batch], Tensor]:
    scheduler = DDPMScheduler(num_train_timesteps=1000, prediction_type=kind)

    def losses(model: Any, batch: Batch) -> Tensor:
        predicted = model(_noisy(batch), batch["timesteps"])[0]
        if kind == "v_prediction":
            target = scheduler.get_velocity(batch["clean"], batch["noise"], batch["timesteps"])
        else:
            target = batch["clean"] if kind == "sample" else batch["noise"]
        return mse(predicted, target)

    return losses


def _flow(model: Any, batch: Batch) -> Tensor:
    """x_t = (1 − σ) x + σ ε, target ε − x; the model is called with σ, as a keyword."""
    sigma = (batch["timesteps"].to(batch["clean"].dtype) + 1) / 1000
    mixed = (1 - sigma)[:, None, None, None] * batch["clean"] + sigma[:, None, None, None] * batch["noise"]
    return mse(model(sample=mixed, timestep=sigma)[0], batch["noise"] - batch["clean"])


def _min_snr(model: Any, batch: Batch) -> Tensor:
    alphas = SCHEDULER.alphas_cumprod.to(batch["clean"].dtype)[batch["timesteps"]]
    snr = alphas / (1 - alphas)
    return mse(model(_noisy(batch), batch["timesteps"])[0], batch["noise"]) * snr.clamp(max=5) / snr


def _weighted(model: Any, batch: Batch) -> Tensor:
    return mse(model(_noisy(batch), batch["timesteps"])[0], batch["noise"]) * batch["weights"]


def _noise_offset(model: Any, batch: Batch) -> Tensor:
    noise = batch["noise"] + 0.1 * batch["offset"]
    noisy = SCHEDULER.add_noise(batch["clean"], noise, batch["timesteps"])
    return mse(model(noisy, batch["timesteps"])[0], noise)


# ── how the model is called ───────────────────────────────────────────────────────────────────────


def _text(count: int) -> Batch:
    return {"text": torch.randn(count, 5, 24)}


def _text_and_size(count: int) -> Batch:
    return {**_text(count), "pooled": torch.randn(count, 16), "sizes": torch.randint(0, 64, (count, 6))}


def _positional(model: Any, batch: Batch) -> Tensor:
    return mse(model(_noisy(batch), batch["timesteps"], batch["text"], return_dict=False)[0], batch["noise"])


def _keyword(model: Any, batch: Batch) -> Tensor:
    found = model(_noisy(batch), timestep=batch["timesteps"], encoder_hidden_states=batch["text"])
    return mse(found.sample, batch["noise"])


def _added(model: Any, batch: Batch) -> Tensor:
    added = {"text_embeds": batch["pooled"], "time_ids": batch["sizes"]}
    found = model(_noisy(batch), batch["timesteps"], batch["text"], added_cond_kwargs=added)
    return mse(found.sample, batch["noise"])


def _sdxl_like() -> dict[str, nn.Module]:
    config = dict(conditional_unet().model.config)
    config |= {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 16 + 6 * 8,
    }
    return {"unet": UNet2DConditionModel.from_config(config)}


def _sdxl_lora() -> dict[str, nn.Module]:
    model: Any = _sdxl_like()["unet"]
    return {"unet": with_lora(model)}


def _conditional() -> dict[str, nn.Module]:
    return {"unet": conditional_unet().model}


def _checkpointed(reentrant: bool) -> dict[str, nn.Module]:
    model: Any = conditional_unet().model
    model.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=reentrant))
    model.train()
    return {"unet": model}


def _with_text_encoder() -> dict[str, nn.Module]:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
    )
    encoder: Any = CLIPTextModel(config)
    return {"text_encoder": encoder, "unet": conditional_unet().model}


def _encoding(models: Any, batch: Batch) -> Tensor:
    encoder, denoiser = list(models.values())
    text = encoder(batch["tokens"])[0]
    return mse(denoiser(_noisy(batch), batch["timesteps"], text).sample, batch["noise"])


LATENT = (4, 16, 16)
CASES = {
    "epsilon": Case(_tiny, _predicting("epsilon")),
    "v": Case(_tiny, _predicting("v_prediction")),
    "sample": Case(_tiny, _predicting("sample")),
    "flow": Case(_tiny, _flow),
    "min-snr": Case(_tiny, _min_snr, plain=False),
    "sample-weights": Case(_tiny, _weighted, extra=lambda n: {"weights": torch.rand(n) + 0.5}, plain=False),
    "noise-offset": Case(_tiny, _noise_offset, extra=lambda n: {"offset": torch.randn(n, 1, 1, 1)}),
    "text-positional": Case(_conditional, _positional, LATENT, _text),
    "text-keyword": Case(_conditional, _keyword, LATENT, _text),
    "text-added": Case(_sdxl_like, _added, LATENT, _text_and_size),
    "checkpointing": Case(partial(_checkpointed, False), _positional, LATENT, _text),
    "checkpointing-reentrant": Case(partial(_checkpointed, True), _positional, LATENT, _text),
    "lora": Case(lambda: {"unet": lora_unet().model}, _positional, LATENT, _text),
    "lora-text-added": Case(_sdxl_lora, _added, LATENT, _text_and_size),
    "unet-and-text-encoder": Case(
        _with_text_encoder, _encoding, LATENT, lambda n: {"tokens": torch.randint(0, 50, (n, 8))}
    ),
}
