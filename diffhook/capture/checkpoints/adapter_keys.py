"""What files and trainers call an adapter's tensors, as parts of a model's layers.

diffusers and peft write a layer's path with dots, kohya's scripts and LyCORIS with underscores; Stable
Diffusion XL has two sets of paths. Read in diffusers 0.42, peft 0.21, LyCORIS 4.1 and the trainers' code of
summer 2026.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

import torch

_DENOISER = re.compile(
    r"(base_model_model_)?(model_)?(lora_unet_|lora_transformer_|lycoris_|unet_|transformer_|diffusion_model_)?"
)
_TEXT = re.compile(r"(?:lora_te|text_encoder)(\d?)(?:_(\d))?_(?:text_model_)?")
_FACTOR = re.compile(r"(.+?)\.(?:(lora_A|lora_down|lora\.down)|lora_B|lora_up|lora\.up)(?:\.[^.]+)?\.weight")
_OLD_FACTOR = re.compile(r"(.+)\.processor\.(to_\w+?)_lora\.(?:(down)|up)\.weight")
_OTHER = re.compile(
    r"(.+?)\.(hada_[wt]\d(?:_[ab])?|lokr_[wt]\d(?:_[ab])?|lora_magnitude_vector|alpha)(?:\.[^.]+?)?(?:\.weight)?"
)


class Part(NamedTuple):
    """One tensor of an adapter: a layer's path in its model, and "lora_A", "hada_w1_a", "alpha" …"""

    layer: str
    name: str


class AdapterKeys(NamedTuple):
    """The keys of a file, or the parameters of a trainer's network.

    Attributes:
        parts: key → what it is, of the model's layers.
        texts: keys that are of text encoders.
        others: key → layer, of what the model's layers have besides: no LoRA, LoHa or LoKr.
        strangers: keys of adapters of layers that the model lacks.
    """

    parts: dict[str, Part]
    texts: list[str]
    others: dict[str, str]
    strangers: list[str]


def adapter_keys(keys: Iterable[str], layers: Collection[str]) -> AdapterKeys:
    """Which part of which layer each key names.

    Args:
        keys: of a file, or names of a trainer's parameters.
        layers: paths of the model's modules.
    """
    found = AdapterKeys({}, [], {}, [])
    split = {key: split_key(key) for key in keys}
    paths = _Paths(layers, {part.layer for part in split.values() if part is not None})
    for key, part in split.items():
        layer = None if part is None else paths.find(part.layer)
        if part is not None and layer is not None:
            found.parts[key] = Part(layer, part.name)
        elif _TEXT.match(_flat(key)):
            found.texts.append(key)
        elif part is not None and part.name != "alpha":
            found.strangers.append(key)
        elif part is None and (owner := paths.owner(key)) is not None:
            found.others[key] = owner
    return found


def text_keys(keys: Iterable[str], layers: Collection[str], number: int) -> dict[str, Part]:
    """Those of the keys that are of a text encoder.

    Args:
        layers: paths of its modules.
        number: which of the pipeline's text encoders, from 1.
    """
    known, found = {_flat(layer): layer for layer in layers}, {}
    for key in keys:
        part = split_key(key)
        match = None if part is None else _TEXT.match(_flat(part.layer))
        if part is None or match is None or int(match[1] or match[2] or 1) != number:
            continue
        rest = _flat(part.layer)[match.end() :]
        layer = next((known[flat] for flat in (rest, f"text_model_{rest}") if flat in known), None)
        if layer is not None:
            found[key] = Part(layer, part.name)
    return found


def split_key(key: str) -> Part | None:
    """A layer's path as the key has it, and the part that it names; None where it names none."""
    key = key.replace("$$", ".")  # ai-toolkit's dots
    if old := _OLD_FACTOR.fullmatch(key):
        layer = f"{old[1]}.{old[2]}" + (".0" if old[2] == "to_out" else "")
        return Part(layer, "lora_A" if old[3] else "lora_B")
    if factor := _FACTOR.fullmatch(key):
        return Part(factor[1], "lora_A" if factor[2] else "lora_B")
    other = _OTHER.fullmatch(key)
    return None if other is None else Part(other[1], other[2])


class _Paths:
    """A model's paths, by whatever a key calls them."""

    def __init__(self, layers: Collection[str], written: Collection[str]) -> None:
        self._known = {_flat(layer): layer for layer in layers if layer}
        self._blocks: Mapping[str, str] = {}
        if any("lora_unet_" in path and self.find(path) is None for path in written):
            self._blocks = _block_names({p for p in written if p.startswith("lora_unet_")})

    def find(self, written: str) -> str | None:
        """The layer that a key calls so; None of no layer of the model."""
        flat = _flat(self._blocks.get(written, written))
        match = _DENOISER.match(flat)
        assert match is not None
        # A layer's own path may begin like a prefix: "transformer_blocks.0".
        starts = [0, *(match.end(group) for group, found in enumerate(match.groups(), 1) if found)]
        return next((self._known[flat[at:]] for at in starts if flat[at:] in self._known), None)

    def owner(self, key: str) -> str | None:
        """The layer that a key begins with."""
        path = key
        while "." in path:
            path = path.rpartition(".")[0]
            if (layer := self.find(path)) is not None:
                return layer
        return None


def _flat(path: str) -> str:
    return path.replace("$$", "_").replace(".", "_")


def _block_names(written: Collection[str]) -> dict[str, str]:
    """Paths of Stable Diffusion XL's own blocks ("input_blocks_4_1_…") → diffusers' paths.

    diffusers converts tensors, not paths: each path goes through it as a LoRA that holds the path's number.
    """
    from types import SimpleNamespace

    from diffusers import StableDiffusionXLPipeline

    order = sorted(written)
    numbered = {}
    for number, path in enumerate(order):
        for factor in ("lora_down", "lora_up"):
            numbered[f"{path}.{factor}.weight"] = torch.full((1, 1), float(number))
    try:
        found, _ = StableDiffusionXLPipeline.lora_state_dict(
            numbered, unet_config=SimpleNamespace(layers_per_block=2)
        )
    except (ValueError, KeyError, NotImplementedError):
        return {}
    paths = {}
    for key, values in found.items():
        if (part := split_key(key)) is not None:
            paths[order[int(values.flatten()[0])]] = part.layer
    return paths
