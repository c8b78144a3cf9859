"""Stable Diffusion 3 and 3.5: flow matching, two CLIPs and T5 (arXiv 2403.03206)."""

from __future__ import annotations

from diffhook.capture.model.families.family import Family


class StableDiffusion3(Family):
    """As train_dreambooth_lora_sd3.py has it, which preconditions outputs: the flow's error counts σ²."""

    pipelines = ("StableDiffusion3Pipeline",)
    told = ("encoder_hidden_states", None, "pooled_projections", None)
    max_sequence_length = 77
    weighting = "preconditioned"
