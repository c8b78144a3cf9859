"""Which layers of a model own its trainable parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from diffhook.compat.deepspeed import wraps
from diffhook.compat.fsdp import standing
from diffhook.compat.torch import own_children, own_parameters
from diffhook.errors import ConfigurationError
from diffhook.gradients.rules import LayerRule, rule_for
from diffhook.gradients.sharding import originals, shapes_of

_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that need gradients, each once, by name: without the prefixes of DDP, FSDP, torch.compile
    and checkpoint wrappers. Of sharded ones, what the optimiser steps, whatever stands for it now."""
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    known = originals(model)
    for name, now in _named(model, ""):
        parameter = known.get(id(now), now)
        if parameter.requires_grad and id(parameter) not in seen:
            seen.add(id(parameter))
            found[name] = parameter
    return found


def chosen(
    parameters: Mapping[str, nn.Parameter], layers: str | Sequence[str] | None
) -> dict[str, nn.Parameter]:
    """Those of ``parameters``, by name, that lie in one of the named modules.

    Args:
        layers: names of modules, "*" for any part of one; whatever is inside a module counts with it.

    Raises:
        ConfigurationError: one of the names matches no module with trainable parameters.
    """
    if layers is None:
        return dict(parameters)
    patterns = [layers] if isinstance(layers, str) else list(layers)
    inside = {pattern: {n for n in parameters if _lies_in(n, pattern)} for pattern in patterns}
    for pattern, names in inside.items():
        if not names:
            some = ", ".join(dict.fromkeys(name.rpartition(".")[0] or name for name in parameters))
            raise ConfigurationError(
                f"layers has {pattern!r}, which matches no trained module; there are {some[:300]}"
            )
    return {name: p for name, p in parameters.items() if any(name in names for names in inside.values())}


def _lies_in(name: str, pattern: str) -> bool:
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:length]), pattern) for length in range(1, len(parts) + 1))


def _named(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in own_parameters(module).items():
        if parameter is not None:
            yield prefix + name, parameter
    for name, child in own_children(module).items():
        if child is not None:
            yield from _named(child, prefix if _wraps(module, name) else f"{prefix}{name}.")


def _wraps(module: nn.Module, child: str) -> bool:
    if child == "module":  # which may be a layer's name as well
        return isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel) or wraps(module)
    return child in _WRAPPED


@dataclass(frozen=True)
class Owned:
    """A layer with a rule, and those of its trainable parameters that the rule explains.

    Attributes:
        parameters: attribute → name in the model.
        tensors: attribute → the parameter itself.
        largest: numbers of the largest of them.
    """

    module: nn.Module
    rule: LayerRule[Any]
    parameters: Mapping[str, str]
    tensors: Mapping[str, nn.Parameter]
    largest: int

    @property
    def needs_input(self) -> bool:
        """Whether the layer's input must be kept for the backward."""
        return not self.parameters.keys() <= set(self.rule.without_input)

    def is_as_found(self, whole: Mapping[str, Tensor]) -> bool:
        """Whether the layer still has the forward and the parameters that its rule explains: pruning,
        weight normalisation and adapters replace them, also in the middle of a training.

        Args:
            whole: name in the model → what stands for a sharded parameter in this pass.
        """
        same = all(
            standing(self.module, local) is whole.get(self.parameters[local], parameter)
            for local, parameter in self.tensors.items()
        )
        return same and not self.rule.is_replaced(self.module)


def find_layers(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, Owned]:
    """Every layer that owns some of ``parameters`` and has a rule, by name."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    known, sizes = originals(model), shapes_of(model, parameters)
    layers: dict[str, Owned] = {}
    for path, module in (model.module if wraps(model) else model).named_modules():  # type: ignore[union-attr]
        rule = rule_for(module)
        if rule is None or rule.obstacle(module) is not None:
            continue
        now = {local: own_parameters(module).get(local) for local in rule.parameters}
        own = {local: known.get(id(p), p) for local, p in now.items()}
        tensors = {local: p for local, p in own.items() if p is not None and id(p) in names}
        if tensors:
            explained = {local: names[id(p)] for local, p in tensors.items()}
            largest = max(sizes[name].numel() for name in explained.values())
            name = ".".join(part for part in path.split(".") if part not in _WRAPPED)
            layers[name or "the model"] = Owned(module, rule, explained, tensors, largest)
    return layers


def tied(layers: Mapping[str, Owned]) -> set[str]:
    """Names of parameters that more than one layer owns."""
    owners: dict[str, int] = defaultdict(int)
    for owned in layers.values():
        for name in owned.parameters.values():
            owners[name] += 1
    return {name for name, count in owners.items() if count > 1}
