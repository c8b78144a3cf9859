"""The adapter in a LoRA file, or in a trainer's network, as one that peft can put on the model."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Size, nn

from diffhook.capture.checkpoints.adapter_keys import AdapterKeys, Part, adapter_keys
from diffhook.capture.checkpoints.adapter_kinds import describe
from diffhook.capture.checkpoints.fused_keys import in_diffusers_names
from diffhook.capture.checkpoints.weights import read_tensors
from diffhook.capture.model.adapter import read_adapter
from diffhook.errors import ConfigurationError

logger = logging.getLogger("diffhook")


def read_lora(files: Sequence[Path], model: nn.Module, alpha: float | None = None) -> dict[str, Any]:
    """The description of the adapter whose weights these are, for
    :func:`~diffhook.capture.model.adapter.add_adapters`; {} where the files hold none.

    Read are LoRA of diffusers, peft, kohya's scripts, ai-toolkit and OneTrainer, and LoHa and LoKr of
    LyCORIS and of trainers that name them alike.

    Args:
        files: of the weights.
        model: the denoiser that it is to be put on.
        alpha: of the adapter; by default what the files tell, or else the rank, as diffusers takes it.

    Raises:
        ConfigurationError: a file cannot be read, is of another model, or of a kind that peft lacks.
    """
    if (files[0].parent / "adapter_config.json").exists():
        return read_adapter(files[0].parent)
    layers = [name for name, _ in model.named_modules()]
    tensors = in_diffusers_names(read_tensors(files), layers)
    keys = adapter_keys(tensors, layers)
    check_keys(keys, model, str(files[0]))
    shapes = {part: tensors[key].shape for key, part in keys.parts.items() if part.name != "alpha"}
    if not shapes:
        return {}
    if keys.texts:
        logger.warning(
            "the LoRA is also of text encoders (%d tensors), which stay as they are", len(keys.texts)
        )
    told = _metadata_alpha(files) if alpha is None else alpha
    alphas = {part.layer: float(tensors[key]) for key, part in keys.parts.items() if part.name == "alpha"}
    return {"default": describe(by_layer(shapes.items()), model, alphas, told, str(files[0]))}


def check_keys(keys: AdapterKeys, model: nn.Module, where: str) -> None:
    """Raises a ConfigurationError where there is more than peft's adapters of this model."""
    kind = type(model).__name__
    if keys.strangers:
        raise ConfigurationError(
            f"the adapter is not of this model: the {kind} has no layers such as {keys.strangers[0]!r} names"
        )
    if keys.others and keys.parts:
        raise ConfigurationError(
            f"{where} has {next(iter(keys.others))!r} ({len(keys.others)} such), which cannot be rebuilt: of "
            "adapters, LoRA, LoHa and LoKr can, without weight decomposition (DoRA) or trained scalars"
        )


def by_layer(shapes: Iterable[tuple[Part, Size]]) -> dict[str, dict[str, Size]]:
    """Layer → part → its shape."""
    found: defaultdict[str, dict[str, Size]] = defaultdict(dict)
    for part, shape in shapes:
        found[part.layer][part.name] = shape
    return dict(found)


def _metadata_alpha(files: Sequence[Path]) -> float | None:
    if files[0].suffix != ".safetensors":
        return None
    with safe_open(str(files[0]), "pt") as opened:
        metadata: Mapping[str, str] = opened.metadata() or {}
    try:
        fields = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except ValueError as error:
        raise ConfigurationError(f"{files[0]}: its metadata is damaged: {error}") from error
    found = next(
        (fields[key] for key in ("unet.lora_alpha", "transformer.lora_alpha") if key in fields), None
    )
    return None if found is None else float(found)
