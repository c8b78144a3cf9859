"""The path on which an image was generated, step by step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffhook.capture.checks import check_whole
from diffhook.errors import ConfigurationError


class Trajectory:
    """Records a diffusers pipeline's denoising, to be asked about with :func:`diffhook.query`.

    Example:
        >>> path = diffhook.Trajectory(ranges=4)
        >>> pipe("a cat", callback_on_step_end=path, callback_on_step_end_tensor_inputs=path.inputs(pipe))
        >>> diffhook.query(log, path, "journey", pipeline=diffhook.SavedPipeline("models/sd"))
        >>> diffhook.influence(log, "journey")  # of image i in range r: query i · ranges + r

    Each range of timesteps is a query of its own, as each step is in journey-TRAK (arXiv 2312.06205): the
    sample that the model expects at a step, noised anew to that step's timestep. Range 0 is that of the least
    noise, where the image gets its details.

    Args:
        ranges: so many, of equal numbers of the grid's timesteps.
        conditions: the denoiser's arguments for the B images, such as {"class_labels": …}, each of length B;
            by default the prompt as the pipeline's callback tells it.

    Raises:
        ConfigurationError: ranges is under 1.
    """

    def __init__(self, ranges: int = 4, conditions: Mapping[str, Any] | None = None) -> None:
        check_whole("ranges", ranges, 1)
        self.ranges = ranges
        self.conditions: dict[str, Any] = dict(conditions or {})
        self.points: list[
            tuple[float, Tensor]
        ] = []  #: timestep, (B, …) the denoiser's input there; 0: the sample
        self._told = bool(self.conditions)

    def inputs(self, pipe: Any) -> list[str]:
        """What the pipeline's callback is to be given: ``callback_on_step_end_tensor_inputs``."""
        known = getattr(pipe, "_callback_tensor_inputs", ["latents"])
        wanted = ("latents", "prompt_embeds", "add_text_embeds", "add_time_ids")
        return [name for name in wanted if name in known]

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """The pipeline's callback at the end of a step."""
        latents, later = tensors["latents"], pipe.scheduler.timesteps[step + 1 : step + 2]
        if len(later):
            scales = hasattr(pipe.scheduler, "scale_model_input")
            told = pipe.scheduler.scale_model_input(latents, later[0]) if scales else latents
            self.add(float(later[0]), told)
        else:
            self.add(0.0, latents)
        if not self._told:
            self.conditions = _conditions(tensors, len(latents))
        return tensors

    def add(self, timestep: float, samples: Tensor) -> None:
        """One more point: what the denoiser is given at a timestep; at 0, the finished samples.

        Args:
            samples: (B, …).
        """
        self.points.append((timestep, samples.detach().to("cpu", torch.float32, copy=True)))

    def check(self) -> None:
        """Raises a ConfigurationError where nothing was recorded, or images of several calls."""
        if not self.points:
            raise ConfigurationError(
                "the trajectory is empty: generate with it as the pipeline's callback_on_step_end"
            )
        timesteps, shapes = [t for t, _ in self.points], {samples.shape for _, samples in self.points}
        if len(shapes) > 1 or sorted(timesteps)[::-1] != timesteps:
            raise ConfigurationError(
                "the trajectory holds several paths: a call of the pipeline needs one of its own"
            )


def _conditions(tensors: Mapping[str, Any], count: int) -> dict[str, Any]:
    """What the denoiser was told of the images; with guidance, the second half of it."""
    found: dict[str, Any] = {}
    if isinstance(tensors.get("prompt_embeds"), Tensor):
        found["encoder_hidden_states"] = tensors["prompt_embeds"][-count:]
    names = {"text_embeds": "add_text_embeds", "time_ids": "add_time_ids"}
    added = {name: tensors[told][-count:] for name, told in names.items() if told in tensors}
    if added:
        found["added_cond_kwargs"] = added
    return found
