"""torch's FSDP, both of them: which tensor stands for a parameter while its layers run has no public face."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffhook.compat import deepspeed
from diffhook.compat.torch import own_parameters


class Unit(NamedTuple):
    """Modules that FSDP makes whole together.

    Attributes:
        outer: around whose call it does so.
        inner: whose call has nothing of FSDP's in it any more, but for units inside; often the same.
    """

    outer: nn.Module
    inner: nn.Module


class Held(NamedTuple):
    """A parameter that FSDP has taken.

    Attributes:
        parameter: what optimisers step: this process's share.
        shape: of the whole.
        module, name: where the model looks for it; while the layer runs, the whole tensor is there.
    """

    parameter: nn.Parameter
    shape: torch.Size
    module: nn.Module
    name: str


def units(model: nn.Module) -> list[Unit]:
    """Those of a model, the outermost first. DeepSpeed's engine is one that takes no parameter away."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    new, old = (fsdp.FSDPModule, fsdp.FullyShardedDataParallel) if fsdp is not None else ((), ())
    found = []
    for module in model.modules():
        outer: Any = module
        if isinstance(outer, new):
            found.append(Unit(outer, outer))
        elif isinstance(outer, old) or deepspeed.wraps(outer):
            found.append(Unit(outer, outer.module))
    return found


def held(unit: Unit) -> Iterator[Held]:
    """What a unit has taken, but for what units inside have."""
    if unit.outer is unit.inner:
        yield from _held_by_new(unit.outer)
    elif wraps(unit.outer):
        yield from _held_by_old(unit.outer)


def _held_by_new(module: Any) -> Iterator[Held]:
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)  # torch 2.11 and later: several
    for group in [state._fsdp_param_group] if groups is None else groups:
        for one in () if group is None else group.fsdp_params:
            info = one._module_info
            yield Held(one.sharded_param, one.sharded_param.shape, info.module, info.param_name)


def _held_by_old(module: Any) -> Iterator[Held]:
    handle = module._handle
    if handle is not None:
        flat = handle.flat_param
        each = zip(flat._params or (), flat._shapes, flat._param_infos, strict=False)
        for parameter, shape, info in each:
            yield Held(parameter, shape, info.module, info.param_name)


def standing(module: nn.Module, name: str) -> Tensor | None:
    """What a module uses for its parameter now; in a backward, views of a flat one are no parameters."""
    own: Tensor | None = own_parameters(module).get(name)
    return vars(module).get(name) if own is None else own


def keeps_parameters(unit: Unit) -> bool:
    """Whether there are parameters beside the flat one that they are pieces of."""
    outer: Any = unit.outer
    return not wraps(outer) or outer._handle is None or outer._handle.flat_param._params is not None


@contextmanager
def whole(unit: Unit) -> Iterator[None]:
    """While entered, the unit's own parameters are whole, and other shares are put back after. A collective.
    Only of a unit whose parameters have no ``full_tensor``."""
    fsdp = sys.modules["torch.distributed.fsdp"]
    with fsdp.FullyShardedDataParallel.summon_full_params(unit.outer, recurse=False, writeback=False):
        yield


def processes(unit: Unit) -> Iterator[int]:
    """Over how many processes the unit's parameters are spread."""
    if unit.outer is unit.inner:
        parameters: Iterator[Any] = (one.parameter for one in held(unit))
        yield from (parameter.device_mesh.size() for parameter in parameters)
    else:
        outer: Any = unit.outer
        yield outer.process_group.size() if wraps(outer) else outer.dp_world_size


def wraps(module: nn.Module) -> bool:
    """Whether this is FSDP's wrapper of a model, which is its ``module``."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel)


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before it was sharded in place."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = type(module)
    if fsdp is None or not issubclass(kind, fsdp.FSDPModule):
        return kind
    return next(base for base in kind.__mro__ if not issubclass(base, fsdp.FSDPModule))
