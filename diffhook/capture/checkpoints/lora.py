"""A LoRA file as an adapter that peft can put on the model: its layers, ranks and scales."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from diffhook.capture.checkpoints.weights import read_tensors
from diffhook.capture.model.adapter import read_adapter
from diffhook.errors import ConfigurationError

logger = logging.getLogger("diffhook")

_TEXT = "text_encoder"
_DOWN = re.compile(r"(.+?)\.(?:lora_A\.weight|lora_A\.[^.]+\.weight|lora\.down\.weight)")
_OLD_DOWN = re.compile(r"(.+)\.processor\.(to_\w+?)_lora\.down\.weight")
_ROOTS = ("unet.", "transformer.", "base_model.model.")


def read_lora(files: Sequence[Path], alpha: float | None = None) -> dict[str, Any]:
    """The description of the adapter whose weights these are, for
    :func:`~diffhook.capture.model.adapter.add_adapters`; {} where the files hold none.

    Args:
        files: of the weights.
        alpha: of LoRA; by default what the files tell, or else the rank, as diffusers takes it.

    Raises:
        ConfigurationError: a file cannot be read.
    """
    if (files[0].parent / "adapter_config.json").exists():
        return read_adapter(files[0].parent)
    tensors = read_tensors(files)
    layers = {layer: key for key in tensors if (layer := _layer(key)) is not None}
    if not layers:
        return {}
    if others := sum(key.startswith(_TEXT) for key in tensors):
        logger.warning("the LoRA is also of text encoders (%d tensors), which stay as they are", others)
    ranks = {layer: len(tensors[key]) for layer, key in layers.items()}
    told = _metadata_alpha(files) if alpha is None else alpha
    alphas = {
        layer: _alpha(tensors, key, float(ranks[layer]) if told is None else told)
        for layer, key in layers.items()
    }
    rank, usual = (Counter(found.values()).most_common(1)[0][0] for found in (ranks, alphas))
    described: dict[str, Any] = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": usual,
        "target_modules": sorted(layers),
        "rank_pattern": {layer: own for layer, own in ranks.items() if own != rank},
        "alpha_pattern": {layer: own for layer, own in alphas.items() if own != usual},
    }
    return {"default": {key: value for key, value in described.items() if value != {}}}


def _layer(key: str) -> str | None:
    """The denoiser's layer that a key is the first factor of; None of any other key."""
    if key.startswith(_TEXT):
        return None
    if old := _OLD_DOWN.fullmatch(key):
        layer = f"{old[1]}.{old[2]}" + (".0" if old[2] == "to_out" else "")
    elif match := _DOWN.fullmatch(key):
        layer = match[1]
    else:
        return None
    for root in _ROOTS:
        layer = layer.removeprefix(root)
    return layer


def _alpha(tensors: Mapping[str, Tensor], key: str, default: float) -> float:
    """Of the layer whose first factor has this key: what kohya's files hold, or the default."""
    found = next((tensors[k] for k in (f"{key}.alpha", f"{_stem(key)}.alpha") if k in tensors), None)
    return default if found is None else float(found)


def _stem(key: str) -> str:
    match = _DOWN.fullmatch(key)
    return key if match is None else match[1]


def _metadata_alpha(files: Sequence[Path]) -> float | None:
    if files[0].suffix != ".safetensors":
        return None
    with safe_open(str(files[0]), "pt") as opened:
        metadata = opened.metadata() or {}
    try:
        fields = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except ValueError as error:
        raise ConfigurationError(f"{files[0]}: its metadata is damaged: {error}") from error
    found = next(
        (fields[key] for key in ("unet.lora_alpha", "transformer.lora_alpha") if key in fields), None
    )
    return None if found is None else float(found)
