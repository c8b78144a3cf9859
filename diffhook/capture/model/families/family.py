"""What a kind of pipeline trains its denoiser on, said in a few names."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffhook.errors import ConfigurationError


@dataclass(frozen=True)
class Choices:
    """What a training chose and no file of its pipeline tells; None: as diffusers' script has it.

    Attributes:
        resolution: of the images, in pixels a side.
        max_sequence_length: tokens of a caption, as the pipeline's ``encode_prompt`` takes them.
        guidance_scale: that a guidance-distilled model was told.
    """

    resolution: int | None = None
    max_sequence_length: int | None = None
    guidance_scale: float | None = None


class Family:
    """A kind of pipeline. Most are no more than the names below.

    Attributes:
        pipelines: class names of pipelines.
        denoiser: the pipeline's component that is trained.
        told: what ``encode_prompt`` returns, in its order, by the denoiser's names; None: not for it. Empty:
            the pipeline takes no captions.
        max_sequence_length: of diffusers' script; None: the pipeline has no such choice.
        guidance_scale: likewise.
        timestep_scale: factor on the scheduler's timestep that the denoiser is told.
        weighting: of diffusers' script, on the error of the prediction.

    Args:
        pipe: the loaded pipeline.
        choices: of the training.

    Raises:
        ConfigurationError: the pipeline has no such choice, or its denoiser no such arguments.
    """

    pipelines: tuple[str, ...] = ()
    denoiser = "transformer"
    told: tuple[str | None, ...] = ()
    max_sequence_length: int | None = None
    guidance_scale: float | None = None
    timestep_scale = 1.0
    weighting: str | None = None

    def __init__(self, pipe: Any, choices: Choices) -> None:
        self.pipe = pipe
        kind = type(pipe).__name__
        for name in ("max_sequence_length", "guidance_scale"):
            given = getattr(choices, name)
            if given is not None and getattr(self, name) is None:
                raise ConfigurationError(f"a {kind} is not trained with a {name}: leave it out")
            setattr(self, name, getattr(self, name) if given is None else given)
        self._check_arguments()
        self._resolution = choices.resolution
        if choices.resolution is not None and (choices.resolution < 1 or choices.resolution % self.multiple):
            raise ConfigurationError(
                f"resolution is {choices.resolution}; a {kind} takes multiples of {self.multiple} pixels"
            )

    def _check_arguments(self) -> None:
        """By the denoiser's signature: another version of diffusers may have another."""
        parameters = inspect.signature(self.model.forward).parameters
        lacking = [name for name in self.arguments if name not in parameters]
        if lacking:
            raise ConfigurationError(
                f"the {type(self.model).__name__} of this diffusers takes no {lacking[0]!r}, which "
                f"{type(self.pipe).__name__} tells it"
            )

    @property
    def arguments(self) -> tuple[str, ...]:
        """Of the denoiser, which :meth:`conditions` may give it."""
        return tuple(name for name in self.told if name is not None)

    @property
    def model(self) -> Any:
        return getattr(self.pipe, self.denoiser)

    @property
    def takes_captions(self) -> bool:
        return bool(self.told)

    @property
    def classes(self) -> int | None:
        """How many class labels the denoiser tells apart; None: it is told none."""
        return None

    @property
    def factor(self) -> int:
        """Pixels a side of one latent."""
        vae = getattr(self.pipe, "vae", None)
        if vae is None:
            return 1
        own = getattr(self.pipe, "vae_scale_factor", None)
        return int(own or 2 ** (len(vae.config.block_out_channels) - 1))

    @property
    def multiple(self) -> int:
        """Of pixels, which an image's sides must be."""
        return self.factor * int(self.model.config.get("patch_size") or 1)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the training's images, in pixels; by default what the model was made for."""
        if self._resolution is not None:
            return self._resolution, self._resolution
        height, width = sides(self.made_for)
        return height * self.factor, width * self.factor

    @property
    def chosen(self) -> dict[str, Any]:
        """What :class:`Choices` says, defaults included, as a log keeps it; none that it lacks."""
        height, width = self.size
        found = {name: getattr(self, name) for name in ("max_sequence_length", "guidance_scale")}
        known = {name: value for name, value in found.items() if value is not None}
        return {"resolution": height if height == width else None, **known}

    @property
    def made_for(self) -> Any:
        """The latents' sides, or one number for both."""
        return self.model.config.sample_size

    def conditions(self, captions: list[str], size: tuple[int, int]) -> dict[str, Any]:
        """The denoiser's arguments besides samples and timesteps, as :func:`default_inputs` takes them.

        Args:
            captions: Q texts.
            size: (H, W) of the images, in pixels.
        """
        return self.encoded(captions) if self.told else {}

    def encoded(self, captions: list[str]) -> dict[str, Any]:
        """What the pipeline's own ``encode_prompt`` makes of captions, without guidance, by names."""
        asked = {
            "prompt": captions,
            "prompt_2": None,
            "prompt_3": None,
            "device": self.pipe.device,
            "num_images_per_prompt": 1,
            "do_classifier_free_guidance": False,
            "max_sequence_length": self.max_sequence_length,
        }
        taken = inspect.signature(self.pipe.encode_prompt).parameters
        made = self.pipe.encode_prompt(**{name: value for name, value in asked.items() if name in taken})
        return {name: each for name, each in zip(self.told, made, strict=False) if name is not None}

    def generation(self) -> dict[str, Any]:
        """Options of the pipeline's own call, so that it samples what was trained."""
        options = {"max_sequence_length": self.max_sequence_length, "guidance_scale": self.guidance_scale}
        # Captions and sizes as they are: PixArt's and Sana's pipelines would change them.
        options |= {"clean_caption": False, "use_resolution_binning": False}
        taken = inspect.signature(self.pipe.__call__).parameters
        return {name: value for name, value in options.items() if name in taken and value is not None}

    def pack(self, latents: Tensor) -> Tensor:
        """(Q, C, H, W) latents as the denoiser takes them."""
        return latents

    def unpack(self, packed: Tensor, size: tuple[int, int]) -> Tensor:
        """(Q, C, H, W) of what :meth:`pack` made of images of that size, in pixels."""
        return packed


def sides(size: Any) -> tuple[int, int]:
    """Height and width of a diffusers model's sample_size: a number, or both."""
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def alike(values: Tensor, count: int) -> Tensor:
    """(count, …): the same for each of the samples."""
    return values.expand(count, *values.shape)


def repeated(numbers: list[float], like: Tensor) -> Tensor:
    """(Q, n): the same numbers for each of Q samples, of another tensor's dtype and device."""
    return torch.tensor([numbers], dtype=like.dtype, device=like.device).repeat(len(like), 1)
