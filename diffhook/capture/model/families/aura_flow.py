"""AuraFlow: flow matching; the transformer is told σ."""

from __future__ import annotations

from diffhook.capture.model.families.family import Family


class AuraFlow(Family):
    """diffusers has no script for it: the flow's plain error, with timesteps as its pipeline tells them."""

    pipelines = ("AuraFlowPipeline",)
    told = ("encoder_hidden_states", None, None, None)
    max_sequence_length = 256
    timestep_scale = 1 / 1000
