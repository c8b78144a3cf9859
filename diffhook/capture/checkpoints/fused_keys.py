"""Adapters on Flux's layers as its authors cut them, as kohya's scripts save them.

They have one layer for queries, keys and values, where diffusers has three. diffusers' own conversion gives
each of the three a copy of the first factor and its part of the second, and puts α into both.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from diffhook.errors import ConfigurationError

_FLUX = re.compile(r"lora_unet_(double|single)_blocks_\d+_.+\.lora_down\.weight")

# Not within a UNet's attention.
_BLOCKS = re.compile(r"(^|model\.|transformer\.)(single_)?transformer_blocks\.\d")


def in_diffusers_names(tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of a file, those of such an adapter as diffusers converts them; others as they are.

    Args:
        names: of the model's layers or parameters; where it is no Flux of diffusers, nothing is converted.

    Raises:
        ConfigurationError: diffusers cannot convert them.
    """
    if not any(map(_FLUX.fullmatch, tensors)) or not any(map(_BLOCKS.search, names)):
        return dict(tensors)
    from diffusers import FluxPipeline

    try:
        converted: Any = FluxPipeline.lora_state_dict(dict(tensors))
    except (ValueError, KeyError, AttributeError, NotImplementedError) as error:
        raise ConfigurationError(
            f"diffusers cannot convert the adapter with {next(iter(tensors))!r} to its own Flux: {error}"
        ) from error
    return dict(converted)
