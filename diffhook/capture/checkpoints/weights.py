"""A model's parameters out of a checkpoint, whatever its files call them."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffhook.capture.checkpoints.adapter_keys import Part, adapter_keys, split_key
from diffhook.capture.checkpoints.fused_keys import in_diffusers_names
from diffhook.errors import ConfigurationError
from diffhook.words import one_line

_ADAPTED = re.compile(
    r"(.+)\.(lora_[AB]|lora_magnitude_vector|lora_embedding_[AB]|hada_[wt]\d(?:_[ab])?|lokr_[wt]\d(?:_[ab])?)"
    r"\.([^.]+)(\.weight)?"
)
_SHADOW = re.compile(r"(?:.*\.)?shadow_params\.(\d+)")  # of diffusers' EMAModel
_EMA = re.compile(r"ema|shadow", re.IGNORECASE)

Names = Mapping[str, Sequence[int]]
"""Parameter → shape, in the model's order."""


def read_parameters(files: Sequence[Path], wanted: Names, *, ema: bool = False) -> dict[str, Tensor]:
    """Parameter → its values in a checkpoint, on the CPU.

    Args:
        files: of weights: safetensors, or what ``torch.save`` wrote of tensors in dicts and lists. Nothing
            else in them is unpickled.
        wanted: the trained parameters.
        ema: the averaged weights, where the files hold both.

    Raises:
        ConfigurationError: the files cannot be read, or are not of this model.
    """
    tensors = _as_wanted(in_diffusers_names(read_tensors(files), wanted), wanted)
    names = matched(tensors, wanted, files[0], ema=ema or _EMA.search(files[0].parent.name) is not None)
    found = {name: tensors[key] for name, key in names.items()}
    for name, values in found.items():
        if list(values.shape) != list(wanted[name]):
            raise ConfigurationError(
                f"{files[0]} has {name!r} of shape {list(values.shape)}, the model of {list(wanted[name])}: "
                "it is the checkpoint of another model"
            )
    return found


def read_tensors(files: Iterable[Path]) -> dict[str, Tensor]:
    """All tensors of the files, nested names joined by dots.

    Raises:
        ConfigurationError: a file cannot be read, or holds no tensors.
    """
    found: dict[str, Tensor] = {}
    for file in files:
        try:
            found |= _safetensors(file) if file.suffix == ".safetensors" else dict(_flat(_unpickled(file)))
        except (SafetensorError, OSError, RuntimeError, ValueError, EOFError) as error:
            raise ConfigurationError(f"{file} cannot be read: {one_line(str(error))}") from error
    if not found:
        raise ConfigurationError(f"{next(iter(files))} holds no tensors")
    return found


def _as_wanted(tensors: dict[str, Tensor], wanted: Names) -> dict[str, Tensor]:
    """Tensors of adapters under the names of the wanted parameters, in their shapes: trainers write a factor
    of a convolution with or without its 1 × 1 kernel."""
    names = {part: name for name in wanted if (part := _part(name)) is not None}
    if not names:
        return tensors
    keys = adapter_keys(tensors, {part.layer for part in names}).parts
    found = dict(tensors)
    for key, part in keys.items():
        if (name := names.get(part)) is not None and name not in tensors:
            values = found.pop(key)
            fits = values.numel() == math.prod(wanted[name])
            found[name] = values.reshape(*wanted[name]) if fits else values
    return found


def _part(name: str) -> Part | None:
    """Which part of an adapter of peft's a parameter is."""
    return split_key(name) if _ADAPTED.fullmatch(name) else None


def _safetensors(file: Path) -> dict[str, Tensor]:
    with safe_open(str(file), "pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping


def _unpickled(file: Path) -> Any:
    import pickle

    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConfigurationError(
            f"{file} holds more than tensors, or was not written by torch.save: save the model's state_dict()"
        ) from error


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping | list | tuple):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, inner in items:
            yield from _flat(inner, f"{name}.{key}" if name else str(key))


def matched(keys: Collection[str], wanted: Names, file: Path, *, ema: bool = False) -> dict[str, str]:
    """Parameter → key in a file that may put a prefix before all of them, such as "module." or "unet.".

    Raises:
        ConfigurationError: not all parameters are there.
    """
    prefixes = sorted(_prefixes(keys, wanted), key=lambda prefix: (_averaged(prefix) != ema, len(prefix)))
    found = [(prefix, _under(prefix, keys, wanted)) for prefix in prefixes]
    whole = [(prefix, names) for prefix, names in found if len(names) == len(wanted)]
    shadow = _shadow(keys, wanted) if ema else None
    if shadow is not None:
        return shadow
    if whole:
        prefix, names = whole[0]
        if ema and not _averaged(prefix) and not _EMA.search(file.parent.name):
            raise ConfigurationError(f"{file} holds no averaged (EMA) weights: leave ema (--ema) out")
        return names
    most = max((names for _, names in found), key=len, default={})
    lacking = [name for name in wanted if name not in most]
    raise ConfigurationError(
        f"{file} lacks {len(lacking)} of the {len(wanted)} trained parameters, such as {lacking[0]!r}; it "
        f"has {', '.join(map(repr, sorted(keys)[:2]))} …: is it a checkpoint of this model?"
    )


def _averaged(prefix: str) -> bool:
    return _EMA.search(prefix) is not None


def _prefixes(keys: Collection[str], wanted: Names) -> set[str]:
    """What may stand before the parameters' names: learned from the first and the last of them."""
    found = set()
    for name in (next(iter(wanted)), next(reversed(list(wanted)))):
        for alias in _aliases(name):
            ends = (key[: -len(alias)] for key in keys if key.endswith(alias))
            found |= {prefix for prefix in ends if not prefix or prefix.endswith(".")}
    return found


def _under(prefix: str, keys: Collection[str], wanted: Names) -> dict[str, str]:
    found = {}
    for name in wanted:
        key = next((prefix + alias for alias in _aliases(name) if prefix + alias in keys), None)
        if key is not None:
            found[name] = key
    return found


def _aliases(name: str) -> list[str]:
    """What files call a parameter: peft leaves the adapter's name out."""
    match = _ADAPTED.fullmatch(name)
    if match is None:
        return [name]
    layer, part, _, end = match.groups(default="")
    return [name, f"{layer}.{part}{end}"]


def _shadow(keys: Collection[str], wanted: Names) -> dict[str, str] | None:
    """Of a list of averaged parameters, in the model's order; None where there is none of that length."""
    numbered = {int(match[1]): key for key in keys if (match := _SHADOW.fullmatch(key))}
    if len(numbered) != len(wanted) or set(numbered) != set(range(len(wanted))):
        return None
    return {name: numbered[position] for position, name in enumerate(wanted)}
