"""LoRA files of kohya's scripts and their kin: their names of layers as diffusers has them."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from diffhook.errors import ConfigurationError

_PREFIXES = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")
_XL = SimpleNamespace(layers_per_block=2)  # what Stable Diffusion XL's own numbers of blocks are counted by


def diffusers_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of such a file under diffusers' names, each factor's scale as "….alpha"; others as they are.

    Raises:
        ConfigurationError: diffusers does not know the file's kind.
    """
    if not all(name.startswith(_PREFIXES) for name in tensors):
        return tensors
    from diffusers import StableDiffusionXLPipeline

    try:
        found, alphas = StableDiffusionXLPipeline.lora_state_dict(dict(tensors), unet_config=_XL)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise ConfigurationError(
            f"diffusers cannot read this LoRA of {next(iter(tensors))!r}: {error}"
        ) from error
    return {**found, **{name: torch.tensor(float(alpha)) for name, alpha in (alphas or {}).items()}}
