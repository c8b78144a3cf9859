"""Which layers of a model own its trainable parameters."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from diffhook.gradients.rules import LayerRule, rule_for

_WRAPPERS = re.compile(r"(^|\.)(module|_orig_mod|_checkpoint_wrapped_module)(?=\.)")


def clean_name(name: str) -> str:
    """A parameter's name without the prefixes of DDP, torch.compile and checkpoint wrappers."""
    return _WRAPPERS.sub("", name).lstrip(".")


@dataclass(frozen=True)
class Owned:
    """A layer with a rule, and its trainable parameters: local name → name in the model."""

    module: nn.Module
    rule: LayerRule
    parameters: Mapping[str, str]


def find_layers(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, Owned]:
    """Every layer that owns some of ``parameters`` and has a rule, by name."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    layers: dict[str, Owned] = {}
    for path, module in model.named_modules():
        own = {
            local: names[id(parameter)]
            for local, parameter in module._parameters.items()
            if parameter is not None and id(parameter) in names
        }
        rule = rule_for(module)
        if own and rule is not None and rule.obstacle(module) is None:
            layers[path or "the model"] = Owned(module, rule, own)
    return layers


def tied(layers: dict[str, Owned]) -> set[str]:
    """Names of parameters that more than one layer owns."""
    owners: dict[str, int] = defaultdict(int)
    for owned in layers.values():
        for name in owned.parameters.values():
            owners[name] += 1
    return {name for name, count in owners.items() if count > 1}
