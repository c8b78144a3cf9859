"""A pipeline saved by diffusers: from images and captions to what its denoiser was trained on."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffhook.errors import ConfigurationError

_ENCODED_AT_ONCE = 8  # images; a VAE at full resolution takes more memory than a denoiser


class SavedPipeline:
    """The folder that ``DiffusionPipeline.save_pretrained`` wrote, loaded in float32.

    Nothing is downloaded.

    Args:
        path: the folder.
        device: where to put the models; by default a GPU if there is one.

    Raises:
        ConfigurationError: no pipeline there, or one of a kind that is not supported.
    """

    def __init__(self, path: str | Path, device: str | torch.device | None = None) -> None:
        from diffusers import DiffusionPipeline

        path = Path(path)
        if not (path / "model_index.json").exists():
            raise ConfigurationError(
                f"no pipeline at {path}: expected a folder that save_pretrained wrote, with model_index.json"
            )
        index = (path / "model_index.json").read_text()
        self.kind = str(json.loads(index).get("_class_name"))
        if self.kind not in CONDITIONS:  # told before gigabytes are read
            raise ConfigurationError(
                f"{path} holds a {self.kind}; supported are {', '.join(CONDITIONS)}. For others encode the "
                "samples yourself: diffhook.query(log, batch, name, objective, model=...)"
            )
        if '"transformers"' in index and not find_spec("transformers"):
            raise ConfigurationError("text encoders need transformers: pip install diffhook[pipelines]")
        self.path = path
        self.pipe: Any = DiffusionPipeline.from_pretrained(path, local_files_only=True)
        self.pipe.set_progress_bar_config(disable=True)
        self.trains_text = False  #: captions stay texts, for a model that encodes them itself
        self._once = _Once()
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        for part in self.pipe.components.values():
            if isinstance(part, nn.Module):
                part.to(self.device).float()

    @property
    def denoiser(self) -> nn.Module:
        """The model that is trained."""
        found: nn.Module = self.pipe.unet
        return found

    @property
    def text_encoders(self) -> list[nn.Module]:
        """Those that there are, in the pipeline's order."""
        found = (getattr(self.pipe, name, None) for name in ("text_encoder", "text_encoder_2"))
        return [encoder for encoder in found if encoder is not None]

    @property
    def vae(self) -> Any:
        """The autoencoder; None for a pipeline on pixels."""
        return getattr(self.pipe, "vae", None)

    @property
    def takes_captions(self) -> bool:
        return CONDITIONS[self.kind] is not _nothing

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images that the denoiser was made for, in pixels."""
        factor = 1 if self.vae is None else int(self.pipe.vae_scale_factor)
        height, width = sides(self.denoiser.config.sample_size)  # type: ignore[union-attr]
        return height * factor, width * factor

    @property
    def channels(self) -> int:
        """Of an image."""
        owner = self.denoiser if self.vae is None else self.vae
        return int(owner.config.in_channels)  # type: ignore[union-attr, arg-type]

    def training_scheduler(self) -> Any:
        """The noise schedule of the training: as diffusers' scripts do, DDPM with the saved betas."""
        from diffusers import DDPMScheduler

        given = self.pipe.scheduler
        return given if hasattr(given, "scale_noise") else DDPMScheduler.from_config(given.config)

    @torch.no_grad()
    def encode(self, images: Tensor, captions: Sequence[str] | None = None) -> dict[str, Any]:
        """Images and captions as a batch for :class:`DiffusionObjective`.

        Latents are the mean of the VAE's posterior, shifted and scaled as in training: training
        draws from it, but a query should be the same each time.

        Args:
            images: (Q, C, H, W) in [−1, 1].
            captions: Q texts, for pipelines that take them.

        Returns:
            "latents" (Q, …) and the denoiser's conditions, on :attr:`device`.

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
            return CONDITIONS[self.kind](self.pipe, list(captions), tuple(size or self.size))
        finally:
            logger.removeFilter(self._once)

    def _latents(self, images: Tensor) -> Tensor:
        if self.vae is None:
            return images
        mean: Tensor = self.vae.encode(images).latent_dist.mode()
        return (mean - (self._shift or 0.0)) * self.vae.config.scaling_factor

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
            for part in latents.split(_ENCODED_AT_ONCE)
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


def sides(size: Any) -> tuple[int, int]:
    """Height and width of a diffusers model's sample_size: a number, or both."""
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def _nothing(pipe: Any, captions: list[str], size: tuple[int, ...]) -> dict[str, Any]:
    return {}


def _text(pipe: Any, captions: list[str], size: tuple[int, ...]) -> dict[str, Any]:
    embedded = pipe.encode_prompt(captions, pipe.device, 1, do_classifier_free_guidance=False)
    return {"encoder_hidden_states": embedded[0]}


def _text_and_size(pipe: Any, captions: list[str], size: tuple[int, ...]) -> dict[str, Any]:
    """Stable Diffusion XL: two text encoders; images count as uncropped at their size."""
    embedded, _, pooled, _ = pipe.encode_prompt(
        captions, device=pipe.device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    times = torch.tensor([*size, 0, 0, *size], dtype=embedded.dtype, device=embedded.device)
    added = {"text_embeds": pooled, "time_ids": times.repeat(len(captions), 1)}
    return {"encoder_hidden_states": embedded, "added_cond_kwargs": added}


CONDITIONS: dict[str, Callable[[Any, list[str], tuple[int, ...]], dict[str, Any]]] = {
    "DDPMPipeline": _nothing,
    "DDIMPipeline": _nothing,
    "StableDiffusionPipeline": _text,
    "StableDiffusionXLPipeline": _text_and_size,
}
"""Pipeline class → (pipeline, captions, (H, W)) → the denoiser's arguments besides the timestep."""
