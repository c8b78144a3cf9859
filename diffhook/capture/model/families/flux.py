"""Flux: flow matching on latents that are packed 2 × 2 into tokens, which are told where they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from diffhook.capture.model.families.family import Family, alike
from diffhook.capture.samples.inputs import SHARED

_PATCH = 2


class Flux(Family):
    """As train_dreambooth_lora_flux.py has it; the loss, a mean, is the same of packed latents."""

    pipelines = ("FluxPipeline",)
    told = ("encoder_hidden_states", "pooled_projections", "txt_ids")
    max_sequence_length = 512
    guidance_scale = 3.5
    timestep_scale = 1 / 1000

    @property
    def arguments(self) -> tuple[str, ...]:
        return (*super().arguments, "img_ids", "guidance")

    @property
    def multiple(self) -> int:
        return self.factor * _PATCH

    @property
    def made_for(self) -> Any:
        return self.pipe.default_sample_size

    def conditions(self, captions: list[str], size: tuple[int, int]) -> dict[str, Any]:
        found = super().conditions(captions, size)
        count, text = len(captions), found["encoder_hidden_states"]
        height, width = (side // self.multiple for side in size)
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        places = torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1).to(text)
        found[SHARED] = {"txt_ids": alike(found.pop("txt_ids"), count), "img_ids": alike(places, count)}
        if self.model.config.guidance_embeds:
            found["guidance"] = torch.full((count,), float(self.guidance_scale or 0.0)).to(text)
        return found

    def pack(self, latents: Tensor) -> Tensor:
        """(Q, tokens, 4 C)."""
        return F.pixel_unshuffle(latents, _PATCH).flatten(2).transpose(1, 2)

    def unpack(self, packed: Tensor, size: tuple[int, int]) -> Tensor:
        height, width = (side // self.multiple for side in size)
        return F.pixel_shuffle(packed.transpose(1, 2).unflatten(2, (height, width)), _PATCH)
