"""peft adapters (LoRA and kin): their configuration as JSON, and from there back onto a model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from torch import nn

from diffhook.errors import ConfigurationError
from diffhook.log.schema import json_like

# Where an adapter came from and which peft wrote it make it no other.
_ORIGIN = ("peft_version", "base_model_name_or_path", "revision", "auto_mapping", "inference_mode")
_FACTOR = re.compile("lora_|hada_|lokr_")  # what trainers' adapters call theirs


def describe_adapters(model: nn.Module) -> dict[str, Any]:
    """Adapter name → its configuration where it is not peft's default, as JSON; empty: none.

    Of a network that a trainer puts on a model, "network" → "alphas" → layer → α, which is no parameter.
    """
    configs = getattr(model, "peft_config", None) or {}
    if not configs and (alphas := _alphas(model)):
        return {"network": {"alphas": alphas}}
    return {name: _described(config) for name, config in configs.items()}


def _alphas(model: nn.Module) -> dict[str, float]:
    """Layer → α, of modules that keep it as a buffer beside their factors."""
    found = {}
    for name, module in model.named_modules():
        alpha = dict(module.named_buffers(recurse=False)).get("alpha")
        if alpha is not None and alpha.numel() == 1 and any(_FACTOR.match(n) for n, _ in _factors(module)):
            found[name] = float(alpha)
    return found


def _factors(module: nn.Module) -> Iterator[tuple[str, Any]]:
    yield from module.named_children()
    yield from module.named_parameters(recurse=False)


def network_alphas(described: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """(layer, α), as a trainer's network calls the layer, of a log's description of a model or several."""
    for name, model in described.get("models", {"": described}).items():
        for layer, alpha in model.get("adapters", {}).get("network", {}).get("alphas", {}).items():
            yield ".".join(filter(None, (name, layer))), alpha


def _described(config: Any) -> dict[str, Any]:
    defaults = _plain(type(config)().to_dict())
    fields = _plain(config.to_dict())
    return {
        key: value
        for key, value in fields.items()
        if key not in _ORIGIN and (key == "peft_type" or value != defaults.get(key))
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(value)
    return value.value if isinstance(value, Enum) else json_like(value)


def add_adapters(model: nn.Module, described: Mapping[str, Any]) -> None:
    """Put the adapters that :func:`describe_adapters` described onto a model; those that it has stay.

    Raises:
        ConfigurationError: peft is not installed, the model lacks the layers, or has another adapter
            of the same name.
    """
    present = describe_adapters(model)
    for name, fields in described.items():
        config = _peft().PeftConfig.from_peft_type(**fields)
        if name in present:
            if present[name] != _described(config):
                raise ConfigurationError(
                    f"the {type(model).__name__} has another adapter {name!r} already: load the model anew"
                )
            continue
        try:
            if hasattr(model, "add_adapter"):  # diffusers': also makes it the active one
                model.add_adapter(config, adapter_name=name)  # type: ignore[operator]
            else:
                _peft().inject_adapter_in_model(config, model, name)
        except ValueError as error:
            layers = fields.get("target_modules") or []
            raise ConfigurationError(
                f"the adapter is not of this model: the {type(model).__name__} has no layers such as "
                f"{layers[0] if isinstance(layers, list) and layers else layers!r}"
            ) from error


def read_adapter(folder: str | Path) -> dict[str, Any]:
    """The description of the adapter that peft saved in a folder (adapter_config.json), as "default".

    Raises:
        ConfigurationError: there is none, or peft is not installed.
    """
    if not Path(folder, "adapter_config.json").exists():
        raise ConfigurationError(f"no LoRA adapter at {folder}: it has no adapter_config.json")
    return {"default": _described(_peft().PeftConfig.from_pretrained(str(folder)))}


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ConfigurationError("adapters need peft: pip install 'diffhook[pipelines]'") from error
    return peft
