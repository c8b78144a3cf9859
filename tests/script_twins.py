"""The losses of diffusers' training scripts, written out from their formulas, on parts of a saved pipeline.

Text encoders and autoencoders are called directly; of the pipelines, only Flux's packing is taken.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoTokenizer,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Model,
    T5EncoderModel,
    T5Tokenizer,
)

from tests.denoisers import TOKENS


def _tokens(words: Any, captions: Sequence[str], length: int) -> Any:
    return words(
        list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )


class Twin(ABC):
    """One family. A batch holds "latents", "noise", "timesteps" and what the denoiser is told.

    Args:
        folder: of the pipeline.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        vae = AutoencoderKL.from_pretrained(self.folder / "vae")
        return (vae.encode(images).latent_dist.mode() - vae.config.shift_factor) * vae.config.scaling_factor

    @torch.no_grad()
    @abstractmethod
    def told(self, captions: Sequence[str]) -> dict[str, Tensor]: ...

    @abstractmethod
    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor: ...

    def noise(self, drawn: Tensor, latents: Tensor) -> Tensor:
        """(…) noise in the latents' shape, of that which was drawn in the denoiser's."""
        return drawn

    def _t5(self, number: str, captions: Sequence[str], masked: bool = False) -> tuple[Tensor, Tensor]:
        tokens = _tokens(T5Tokenizer.from_pretrained(self.folder / f"tokenizer{number}"), captions, TOKENS)
        encoder = T5EncoderModel.from_pretrained(self.folder / f"text_encoder{number}").eval()
        mask = tokens.attention_mask
        return encoder(tokens.input_ids, attention_mask=mask if masked else None)[0], mask

    def _clip(self, kind: Any, number: str, captions: Sequence[str]) -> Any:
        tokens = _tokens(CLIPTokenizer.from_pretrained(self.folder / f"tokenizer{number}"), captions, 12)
        encoder = kind.from_pretrained(self.folder / f"text_encoder{number}").eval()
        return encoder(tokens.input_ids, output_hidden_states=True)


class _Flow(Twin):
    """Flow matching: σ by the place of the timestep in the scheduler's, z_σ = (1 − σ) z + σ ε."""

    def sigmas(self, batch: dict[str, Tensor]) -> Tensor:
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(self.folder / "scheduler")
        places = [int((scheduler.timesteps == t).nonzero()) for t in batch["timesteps"].float()]
        return scheduler.sigmas[places].double().view(-1, 1, 1, 1)

    def mixed(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        sigmas = self.sigmas(batch)
        return (1 - sigmas) * batch["latents"] + sigmas * batch["noise"], sigmas

    def error(self, flow: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return (flow - (batch["noise"] - batch["latents"])).square().flatten(1).mean(1)


class StableDiffusion3(_Flow):
    """train_dreambooth_lora_sd3.py, by default with preconditioned outputs."""

    @torch.no_grad()
    def told(self, captions: Sequence[str]) -> dict[str, Tensor]:
        both = [self._clip(CLIPTextModelWithProjection, number, captions) for number in ("", "_2")]
        clip = torch.cat([each.hidden_states[-2] for each in both], -1)
        t5, _ = self._t5("_3", captions)
        clip = F.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
        return {"text": torch.cat([clip, t5], -2), "pooled": torch.cat([each[0] for each in both], -1)}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        noisy, sigmas = self.mixed(batch)
        predicted = model(
            hidden_states=noisy, timestep=batch["timesteps"], encoder_hidden_states=batch["text"],
            pooled_projections=batch["pooled"], return_dict=False,
        )[0]  # fmt: skip
        clean = predicted * (-sigmas) + noisy
        return (clean - batch["latents"]).square().flatten(1).mean(1)


class Flux(_Flow):
    """train_dreambooth_lora_flux.py."""

    @torch.no_grad()
    def told(self, captions: Sequence[str]) -> dict[str, Tensor]:
        pooled = self._clip(CLIPTextModel, "", captions).pooler_output
        return {"text": self._t5("_2", captions)[0], "pooled": pooled}

    def noise(self, drawn: Tensor, latents: Tensor) -> Tensor:
        height, width = latents.shape[-2:]
        return FluxPipeline._unpack_latents(drawn, height * 2, width * 2, 2)

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        noisy, _ = self.mixed(batch)
        count, channels, height, width = noisy.shape
        places = FluxPipeline._prepare_latent_image_ids(count, height // 2, width // 2, "cpu", noisy.dtype)
        packed = FluxPipeline._pack_latents(noisy, count, channels, height, width)
        assert isinstance(model, FluxTransformer2DModel)
        guidance = torch.full((count,), 3.5).double() if model.config.guidance_embeds else None
        predicted = model(
            hidden_states=packed, timestep=batch["timesteps"] / 1000, guidance=guidance,
            pooled_projections=batch["pooled"], encoder_hidden_states=batch["text"],
            txt_ids=torch.zeros(batch["text"].shape[1], 3).double(), img_ids=places, return_dict=False,
        )[0]  # fmt: skip
        flow = FluxPipeline._unpack_latents(predicted, height * 2, width * 2, 2)
        return self.error(flow, batch)


class AuraFlow(_Flow):
    """No script: as its pipeline calls the model, with the plain error of the flow."""

    @torch.no_grad()
    def told(self, captions: Sequence[str]) -> dict[str, Tensor]:
        text, mask = self._t5("", captions, masked=True)
        return {"text": text * mask[..., None]}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        noisy, _ = self.mixed(batch)
        flow = model(noisy, encoder_hidden_states=batch["text"], timestep=batch["timesteps"] / 1000)[0]
        return self.error(flow, batch)


class Sana(_Flow):
    """train_dreambooth_lora_sana.py: the scheduler is of flow matching, whatever sampler the pipeline has."""

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        vae = AutoencoderDC.from_pretrained(self.folder / "vae")
        return vae.encode(images).latent * vae.config.scaling_factor

    @torch.no_grad()
    def told(self, captions: Sequence[str]) -> dict[str, Tensor]:
        tokens = _tokens(AutoTokenizer.from_pretrained(self.folder / "tokenizer"), captions, TOKENS)
        encoder = Gemma2Model.from_pretrained(self.folder / "text_encoder").eval()
        mask = tokens.attention_mask
        return {"text": encoder(tokens.input_ids, attention_mask=mask)[0], "mask": mask}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        noisy, _ = self.mixed(batch)
        flow = model(
            hidden_states=noisy, encoder_hidden_states=batch["text"], encoder_attention_mask=batch["mask"],
            timestep=batch["timesteps"], return_dict=False,
        )[0]  # fmt: skip
        return self.error(flow, batch)


class _Noise(Twin):
    """DDPM with the pipeline's betas; of what the model says, the first half is the noise."""

    def noisy(self, batch: dict[str, Tensor]) -> Tensor:
        scheduler = DDPMScheduler.from_pretrained(self.folder / "scheduler")
        return scheduler.add_noise(batch["latents"], batch["noise"], batch["timesteps"])

    def error(self, predicted: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return (predicted.chunk(2, dim=1)[0] - batch["noise"]).square().flatten(1).mean(1)


class DiT(_Noise):
    def told(self, captions: Sequence[str]) -> dict[str, Tensor]:
        return {"labels": torch.arange(len(captions)) % 2}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        predicted = model(self.noisy(batch), timestep=batch["timesteps"], class_labels=batch["labels"])
        return self.error(predicted.sample, batch)


class PixArt(_Noise):
    """train_pixart_controlnet_hf.py, without its control."""

    @torch.no_grad()
    def told(self, captions: Sequence[str]) -> dict[str, Tensor]:
        text, mask = self._t5("", captions, masked=True)
        return {"text": text, "mask": mask}

    def loss(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        count = len(batch["latents"])
        size: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if model.config.sample_size == 128:
            side = 2.0 * batch["latents"].shape[-1]
            size = {"resolution": torch.tensor([side, side]).repeat(count, 1).double()}
            size["aspect_ratio"] = torch.ones(count, 1).double()
        predicted = model(
            self.noisy(batch), encoder_hidden_states=batch["text"], encoder_attention_mask=batch["mask"],
            timestep=batch["timesteps"], added_cond_kwargs=size, return_dict=False,
        )[0]  # fmt: skip
        return self.error(predicted, batch)
