"""Kinds of pipelines, one a file: which there are, and why others are refused."""

from __future__ import annotations

import re

from diffhook.capture.model.families.aura_flow import AuraFlow
from diffhook.capture.model.families.dit import DiT
from diffhook.capture.model.families.family import Choices, Family, sides
from diffhook.capture.model.families.flux import Flux
from diffhook.capture.model.families.pixart import PixArtAlpha, PixArtSigma
from diffhook.capture.model.families.sana import Sana
from diffhook.capture.model.families.stable_diffusion_3 import StableDiffusion3
from diffhook.capture.model.families.unet import Pixels, StableDiffusion, StableDiffusionXL
from diffhook.errors import ConfigurationError

__all__ = ["FAMILIES", "Choices", "Family", "find_family", "sides"]

_KINDS: tuple[type[Family], ...] = (
    Pixels, StableDiffusion, StableDiffusionXL, DiT, PixArtAlpha, PixArtSigma, StableDiffusion3, Flux, Sana,
    AuraFlow,
)  # fmt: skip
FAMILIES = {name: kind for kind in _KINDS for name in kind.pipelines}
"""Pipeline class → its kind."""

_WHY = {
    "Wan|LTX|HunyuanVideo|CogVideoX|Mochi|Allegro|Latte|SkyReels|Cosmos|EasyAnimate|SanaVideo|TextToVideo|"
    "AnimateDiff|StableVideo": "it is trained on videos, and images are read here",
    "Lumina|ZImage": "its model is told how much of the sample is in its input, and not how much noise",
    "Img2Img|Inpaint|Kontext|Control|Fill|Edit|Depth|Redux|Upscale|Pix2Pix": "its model is given more than "
    "an image and a caption",
    "QwenImage|Flux2|HiDream|OmniGen|Chroma|HunyuanDiT|CogView|Bria|Kandinsky|Cascade|Wuerstchen": "how its "
    "model was trained is not known here",
}  # pattern in a pipeline's class name → why it is not served; the first that fits


def find_family(kind: str, path: object) -> type[Family]:
    """The kind of a pipeline class.

    Args:
        kind: the class's name.
        path: of the pipeline, for the error.

    Raises:
        ConfigurationError: it is none that is served.
    """
    if kind in FAMILIES:
        return FAMILIES[kind]
    why = next((f" ({reason})" for pattern, reason in _WHY.items() if re.search(pattern, kind)), "")
    raise ConfigurationError(
        f"{path} holds a {kind}{why}; supported are {', '.join(FAMILIES)}. For others encode the samples "
        "yourself: diffhook.query(log, batch, name, objective, model=...)"
    )
