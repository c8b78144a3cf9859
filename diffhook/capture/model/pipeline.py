"""A pipeline saved by diffusers: from images and captions to what its denoiser was trained on."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffhook.capture.model.families import Choices, find_family
from diffhook.capture.objective.diffusion import DiffusionObjective
from diffhook.capture.objective.weighting import Weighting
from diffhook.errors import ConfigurationError

_TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
_ENCODED_AT_ONCE = 8  # images; a VAE at full resolution takes more memory than a denoiser


class SavedPipeline:
    """The folder that ``DiffusionPipeline.save_pretrained`` wrote, loaded in float32.

    Nothing is downloaded. What the training chose and the folder does not tell is by default as diffusers'
    own script for such a model has it.

    Args:
        path: the folder.
        device: where to put the models; by default a GPU if there is one.
        resolution: of the training's images, in pixels a side; by default what the denoiser was made for.
        max_sequence_length: tokens of a caption, where the pipeline's ``encode_prompt`` takes such a number.
        guidance_scale: that a guidance-distilled model (Flux) was told in training.

    Raises:
        ConfigurationError: no pipeline there, or one of a kind that is not supported; or one that is not
            trained with these choices.
    """

    def __init__(
        self,
        path: str | Path,
        device: str | torch.device | None = None,
        *,
        resolution: int | None = None,
        max_sequence_length: int | None = None,
        guidance_scale: float | None = None,
    ) -> None:
        from diffusers import DiffusionPipeline

        path = Path(path)
        if not (path / "model_index.json").exists():
            raise ConfigurationError(
                f"no pipeline at {path}: expected a folder that save_pretrained wrote, with model_index.json"
            )
        index = (path / "model_index.json").read_text()
        self.kind = str(json.loads(index).get("_class_name"))
        family = find_family(self.kind, path)  # told before gigabytes are read
        if '"transformers"' in index and not find_spec("transformers"):
            raise ConfigurationError("text encoders need transformers: pip install 'diffhook[pipelines]'")
        self.path = path
        self.pipe: Any = DiffusionPipeline.from_pretrained(path, local_files_only=True)
        self.pipe.set_progress_bar_config(disable=True)
        self.family = family(self.pipe, Choices(resolution, max_sequence_length, guidance_scale))
        self.trains_text = False  #: captions stay texts, for a model that encodes them itself
        self._once = _Once()
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        for part in self.pipe.components.values():
            if isinstance(part, nn.Module):
                part.to(self.device).float()

    @property
    def denoiser(self) -> nn.Module:
        """The model that is trained."""
        found: nn.Module = self.family.model
        return found

    @property
    def text_encoders(self) -> list[nn.Module]:
        """Those that there are, in the pipeline's order."""
        found = (getattr(self.pipe, name, None) for name in _TEXT_ENCODERS)
        return [encoder for encoder in found if encoder is not None]

    @property
    def vae(self) -> Any:
        """The autoencoder; None for a pipeline on pixels."""
        return getattr(self.pipe, "vae", None)

    @property
    def takes_captions(self) -> bool:
        return self.family.takes_captions

    @property
    def classes(self) -> int | None:
        """How many class labels the denoiser tells apart; None: it is told none."""
        return self.family.classes

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the training's images, in pixels."""
        return self.family.size

    @property
    def chosen(self) -> dict[str, Any]:
        """What the training chose, by the names of this class's arguments; a log of checkpoints keeps it.

        "resolution" is None where the training's images are not square.
        """
        return self.family.chosen

    @property
    def channels(self) -> int:
        """Of an image."""
        owner = self.denoiser if self.vae is None else self.vae
        return int(owner.config.in_channels)  # type: ignore[union-attr, arg-type]

    def training_scheduler(self) -> Any:
        """The noise schedule of the training, whichever sampler the pipeline has: as diffusers' scripts do,
        that of flow matching, or DDPM with the saved betas."""
        from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

        given = self.pipe.scheduler
        if hasattr(given, "scale_noise"):
            return given
        flow = given.config.get("prediction_type") == "flow_prediction" or given.config.get("use_flow_sigmas")
        if not flow:
            return DDPMScheduler.from_config(given.config)
        known = inspect.signature(FlowMatchEulerDiscreteScheduler).parameters
        return FlowMatchEulerDiscreteScheduler(**{n: v for n, v in given.config.items() if n in known})

    def objective(
        self,
        scheduler: Any = None,
        prediction_type: str | None = None,
        weighting: Weighting | str | None = None,
    ) -> DiffusionObjective:
        """The training loss, as diffusers' script for such a pipeline has it where nothing else is said.

        Args:
            scheduler: by default :meth:`training_scheduler`.
            prediction_type: by default the scheduler's.
            weighting: of the loss; see :class:`DiffusionObjective`.
        """
        if (scheduler, prediction_type, weighting) == (None, None, None):
            weighting = self.family.weighting
        return DiffusionObjective(
            self.training_scheduler() if scheduler is None else scheduler,
            prediction_type=prediction_type,
            weighting=weighting,
            timestep_scale=self.family.timestep_scale,
        )

    @torch.no_grad()
    def encode(self, images: Tensor, captions: Sequence[str] | None = None) -> dict[str, Any]:
        """Images and captions as a batch for :class:`DiffusionObjective`.

        Latents are the mean of the VAE's posterior, shifted and scaled as in training: training
        draws from it, but a query should be the same each time.

        Args:
            images: (Q, C, H, W) in [−1, 1].
            captions: Q texts, for pipelines that take them.

        Returns:
            "latents" (Q, …), for Flux packed into tokens, and the denoiser's conditions, on :attr:`device`.

        Raises:
            ConfigurationError: captions that are missing, too many, or not wanted.
        """
        parts = [self._latents(part.to(self.device)) for part in images.split(_ENCODED_AT_ONCE)]
        return {"latents": torch.cat(parts), **self.conditions(len(images), captions, images.shape[-2:])}

    @torch.no_grad()
    def conditions(
        self, count: int, captions: Sequence[str] | None, size: Sequence[int] | None = None
    ) -> dict[str, Any]:
        """The denoiser's arguments for ``count`` samples with these captions; size: (H, W)."""
        if self.takes_captions and captions is None:
            raise ConfigurationError(f"{self.kind} takes captions: give one per image")
        if not self.takes_captions and captions is not None:
            raise ConfigurationError(f"{self.kind} takes no captions")
        if captions is not None and len(captions) != count:
            raise ConfigurationError(f"there are {len(captions)} captions for {count} images")
        if self.trains_text and captions is not None:
            return {"captions_to_encode": list(captions)}
        return self.embed(captions or (), size)

    def embed(self, captions: Sequence[str], size: Sequence[int] | None = None) -> dict[str, Any]:
        """The denoiser's arguments for these captions, with gradients where they are enabled."""
        logger = logging.getLogger(type(self.pipe).__module__)
        logger.addFilter(self._once)  # one that a caption is cut short comes again at every snapshot
        try:
            height, width = size or self.size
            return self.family.conditions(list(captions), (height, width))
        finally:
            logger.removeFilter(self._once)

    def _latents(self, images: Tensor) -> Tensor:
        if self.vae is None:
            return images
        made = self.vae.encode(images)
        mean: Tensor = made.latent_dist.mode() if hasattr(made, "latent_dist") else made.latent
        return self.family.pack((mean - (self._shift or 0.0)) * self.vae.config.scaling_factor)

    @property
    def _shift(self) -> float | None:
        return getattr(self.vae.config, "shift_factor", None)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """(Q, C, H, W) images in [−1, 1] of latents as :meth:`encode` gives them."""
        if self.vae is None:
            return latents
        parts = [
            self.vae.decode(part / self.vae.config.scaling_factor + (self._shift or 0.0)).sample
            for part in self.family.unpack(latents, self.size).split(_ENCODED_AT_ONCE)
        ]
        return torch.cat(parts).clamp(-1, 1)

    def generate(self, captions: Sequence[str], seeds: Sequence[int], steps: int) -> Tensor:
        """Latents (Q, …) that the pipeline samples with its own scheduler and guidance, a seed each."""
        height, width = self.size
        found: Tensor = self.pipe(
            prompt=list(captions),
            num_inference_steps=steps,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            height=height,
            width=width,
            output_type="latent",
            **self.family.generation(),
        ).images
        return found


class _Once(logging.Filter):
    """Lets each message through once."""

    def __init__(self) -> None:
        super().__init__()
        self._told: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        new = message not in self._told
        self._told.add(message)
        return new
