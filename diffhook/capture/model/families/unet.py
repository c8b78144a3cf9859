"""Pipelines with a UNet: on pixels, Stable Diffusion, Stable Diffusion XL."""

from __future__ import annotations

from typing import Any

from diffhook.capture.model.families.family import Family, repeated


class Pixels(Family):
    pipelines = ("DDPMPipeline", "DDIMPipeline")
    denoiser = "unet"

    @property
    def classes(self) -> int | None:
        found: int | None = self.model.config.get("num_class_embeds")
        return found


class StableDiffusion(Family):
    pipelines = ("StableDiffusionPipeline",)
    denoiser = "unet"
    told = ("encoder_hidden_states",)


class StableDiffusionXL(Family):
    """Two text encoders; images count as uncropped at their size."""

    pipelines = ("StableDiffusionXLPipeline",)
    denoiser = "unet"
    told = ("encoder_hidden_states", None, "text_embeds", None)

    @property
    def arguments(self) -> tuple[str, ...]:
        return "encoder_hidden_states", "added_cond_kwargs"

    def conditions(self, captions: list[str], size: tuple[int, int]) -> dict[str, Any]:
        found = self.encoded(captions)
        pooled = found.pop("text_embeds")
        times = repeated([*size, 0, 0, *size], found["encoder_hidden_states"])
        return {**found, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": times}}
