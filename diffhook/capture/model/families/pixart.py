"""PixArt-α and PixArt-Σ: T5's embeddings with their mask; some are told the images' size."""

from __future__ import annotations

from typing import Any

from diffhook.capture.model.families.family import Family, repeated


class PixArtAlpha(Family):
    """As diffusers' PixArt script has it, ε-prediction by the saved betas."""

    pipelines = ("PixArtAlphaPipeline",)
    told = ("encoder_hidden_states", "encoder_attention_mask", None, None)
    max_sequence_length = 120

    @property
    def arguments(self) -> tuple[str, ...]:
        return (*super().arguments, "added_cond_kwargs")

    def conditions(self, captions: list[str], size: tuple[int, int]) -> dict[str, Any]:
        found = super().conditions(captions, size)
        if self.model.use_additional_conditions:
            text, (height, width) = found["encoder_hidden_states"], size
            found["added_cond_kwargs"] = {
                "resolution": repeated([height, width], text),
                "aspect_ratio": repeated([height / width], text),
            }
        return found


class PixArtSigma(PixArtAlpha):
    pipelines = ("PixArtSigmaPipeline",)
    max_sequence_length = 300
