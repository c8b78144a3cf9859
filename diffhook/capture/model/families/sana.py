"""Sana: flow matching on latents of a deep-compression autoencoder (arXiv 2410.10629)."""

from __future__ import annotations

from typing import Any

from diffhook.capture.model.families.family import Family


class Sana(Family):
    """As train_dreambooth_lora_sana.py has it, without instructions before the captions."""

    pipelines = ("SanaPipeline",)
    told = ("encoder_hidden_states", "encoder_attention_mask", None, None)
    max_sequence_length = 300

    def generation(self) -> dict[str, Any]:
        return {**super().generation(), "complex_human_instruction": None}
