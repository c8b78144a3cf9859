"""Models whose parameters are spread over processes: each is whole only while its layers run.

What a parameter *is* stays the same, as optimisers know it; what *stands for it* in a forward is another
tensor, with which autograd works, and whose gradient is that of this process's own samples: FSDP adds up the
processes' gradients only after it. So rows and the check that none is missing work on those tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from diffhook.compat import deepspeed, fsdp
from diffhook.errors import ConfigurationError
from diffhook.gradients.local_hook import LocalHook
from diffhook.gradients.tape import Hooks, Tape

NO_SEPARABILITY = "the parameters are sharded, and a backward of our own would be taken for the training's"

_INSTEAD = "train with DDP or FSDP2 (fully_shard), or without diffhook (enabled=False)"


# ── what is refused ───────────────────────────────────────────────────────────────────────────────


def refuse_unsupported(model: nn.Module) -> None:
    """Raises ConfigurationError if the model is sharded in a way that rows cannot be taken from."""
    engines = filter(deepspeed.wraps, model.modules())
    if reason := next(filter(None, map(deepspeed.obstacle, engines)), None):
        raise refusal(reason)
    units = fsdp.units(model)
    if not all(map(fsdp.keeps_parameters, units)):
        raise refusal(FLAT)
    taken = {id(held.parameter) for unit in units for held in fsdp.held(unit)}
    for part in model.modules():
        for reason in _obstacles(part, taken):
            raise refusal(reason)


def refusal(reason: str) -> ConfigurationError:
    """Why the training cannot be captured, and what to do."""
    return ConfigurationError(f"{reason}: {_INSTEAD}")


SPLIT = (
    "parameters are split over a device mesh, and not by fully_shard on the model or its parts: with tensor "
    "parallelism, no process has a sample's whole gradient"
)
FLAT = (
    "FullyShardedDataParallel with use_orig_params=False has flat parameters only, and what is trained "
    "cannot be told by layer, as it can with use_orig_params=True"
)


def _obstacles(module: nn.Module, taken: set[int]) -> Iterator[str]:
    """Told by names: the imports of some take seconds."""
    parameters = list(module.parameters(recurse=False))
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        yield deepspeed.ZERO_3
    for parameter in parameters:
        if _is_distributed(parameter) and not (id(parameter) in taken and _is_split_once(parameter)):
            yield SPLIT


def _is_distributed(tensor: Tensor) -> bool:
    return type(tensor.data).__name__ == "DTensor"


def _is_split_once(parameter: Any) -> bool:
    """Whether a parameter is split over one axis of its mesh, the last one, and the same along the others."""
    *others, last = parameter.placements
    return type(last).__name__ == "Shard" and all(placement.is_replicate() for placement in others)


def refuse_options(model: nn.Module, *, weight_gradients: bool, reuse_products: bool) -> None:
    """Raises ConfigurationError for options of an engine that a sharded model cannot have."""
    if not is_sharded(model):
        return
    if not weight_gradients:
        raise ConfigurationError(
            "the model is sharded by FSDP: passes without weight gradients, as probes and queries make them, "
            "would leave other processes waiting. Make them of the model as one process has it"
        )
    if reuse_products:
        raise ConfigurationError(
            "the model is sharded by FSDP, which takes gradients from where autograd puts them: "
            "reuse_products=True is for whole models"
        )


def refuse_miscounted(model: nn.Module, processes: int) -> None:
    """Raises ConfigurationError if the model is spread over more processes than the capture was told."""
    found = max((count for unit in fsdp.units(model) for count in fsdp.processes(unit)), default=1)
    if found > processes:
        raise ConfigurationError(
            f"the model is sharded over {found} processes, and the hook was told of {processes}: each has "
            "samples of its own, so say rank= and processes="
        )


# ── what stands for what ──────────────────────────────────────────────────────────────────────────


def is_sharded(model: nn.Module) -> bool:
    """Whether processes have but their share of some parameters, or of what an optimiser keeps of them."""
    return bool(fsdp.units(model))


def needs_all_processes(model: nn.Module) -> bool:
    """Whether no process can run the model alone: whole parameters are asked of the others. DeepSpeed's
    engine, of the stages that are not refused, splits what an optimiser keeps, and no parameters."""
    return any(unit.outer is unit.inner or fsdp.wraps(unit.outer) for unit in fsdp.units(model))


def keeps_gradients(model: nn.Module) -> bool:
    """Whether gradients stay where a backward has left them until the loop throws them away."""
    return not any(map(deepspeed.wraps, model.modules()))


def originals(model: nn.Module) -> Mapping[int, nn.Parameter]:
    """id of what stands for a parameter now → the parameter; without those that stand for themselves."""
    return {
        id(now): held.parameter
        for unit in fsdp.units(model)
        for held in fsdp.held(unit)
        if (now := fsdp.standing(held.module, held.name)) is not None and now is not held.parameter
    }


def parameters_of(model: nn.Module) -> Iterator[nn.Parameter]:
    """The model's parameters, whatever stands for them now."""
    known = originals(model)
    for parameter in model.parameters():
        yield known.get(id(parameter), parameter)


def whole_now(unit: fsdp.Unit) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Parameters of a unit, and the tensors that stand for them while its layers run."""
    for held in fsdp.held(unit):
        now = fsdp.standing(held.module, held.name)
        if now is not None and now is not held.parameter and not _is_distributed(now):
            yield held.parameter, now


def own_share(tensor: Tensor) -> Tensor:
    """The numbers that this process has of a tensor; nothing is asked of the others."""
    share: Any = tensor
    return share.to_local() if _is_distributed(tensor) else share


def shapes_of(model: nn.Module, parameters: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """name → shape of the whole parameter."""
    known = {id(held.parameter): held.shape for unit in fsdp.units(model) for held in fsdp.held(unit)}
    return {name: known.get(id(parameter), parameter.shape) for name, parameter in parameters.items()}


def gathered(
    model: nn.Module, parameters: Mapping[str, Tensor], dtype: torch.dtype | None, *, keep: bool
) -> dict[str, Tensor]:
    """Parameters as they are now, whole, on the CPU. All processes must call this at the same point.

    Args:
        model: that they are of.
        parameters: by name.
        dtype: to keep them in; None: each in its own.
        keep: whether this process wants them; the others get an empty result.

    Raises:
        Exception: the first that came while one was kept, once all have been gathered: the other processes
            must not be left waiting.
    """
    found: dict[str, Tensor] = {}
    failed: Exception | None = None
    with torch.no_grad():
        for name, whole in _one_by_one(model, parameters):
            try:
                if keep and failed is None:
                    found[name] = whole.to("cpu", dtype or whole.dtype, copy=True)
            except Exception as error:
                failed = error
    if failed is not None:
        raise failed
    return {name: found[name] for name in parameters if name in found}


def _one_by_one(model: nn.Module, parameters: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Each is gathered when it is asked for, or with its unit."""
    flat = dict.fromkeys(parameters, False)
    names = {id(parameter): name for name, parameter in parameters.items()}
    for unit in fsdp.units(model):
        if fsdp.wraps(unit.outer):
            own = [(names[id(h.parameter)], h.parameter) for h in fsdp.held(unit) if id(h.parameter) in names]
            with fsdp.whole(unit):
                for name, piece in own:
                    flat[name] = True
                    yield name, piece.detach()
    for name, parameter in parameters.items():
        if not flat[name]:
            yield name, _gathered(parameter.detach())


def _gathered(tensor: Any) -> Tensor:
    if _is_distributed(tensor):
        tensor = tensor.to(tensor.device_mesh.device_type).full_tensor()  # it may be offloaded
    return tensor


# ── hooks ─────────────────────────────────────────────────────────────────────────────────────────


class UnitCalls(Protocol):
    """What is told of the calls of units."""

    def on_whole(self, unit: fsdp.Unit) -> None:
        """The unit's parameters are whole now, as they are until its call ends."""

    def on_left(self, output: Any) -> Any:
        """A unit has answered, and FSDP has not seen it yet. Returns what it is to see; None: the same."""


def unit_hooks(model: nn.Module, tape: Tape, watching: Callable[[], UnitCalls]) -> list[Hooks]:
    """Those that a model needs: none that is not sharded."""
    units = fsdp.units(model)
    return [UnitHooks(units, tape, watching)] if units else []


class UnitHooks:
    """Hooks around the calls of FSDP's units, put on the layers before the tape's.

    FSDP's own operations before and after a call are none of the model's: the tape is blind meanwhile.

    Args:
        units: of the model.
        tape: whose hooks they accompany.
        watching: gives the pass under way.
    """

    def __init__(self, units: Sequence[fsdp.Unit], tape: Tape, watching: Callable[[], UnitCalls]) -> None:
        self._units = units
        self._tape = tape
        self._watching = watching
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        self.detach()
        for unit in self._units:

            def begun(*_: Any, unit: fsdp.Unit = unit) -> None:
                self._tape.blind = False
                self._watching().on_whole(unit)

            def left(module: nn.Module, args: Any, output: Any) -> Any:
                seen = self._watching().on_left(output)
                self._tape.blind = True
                return seen

            outer, inner = unit
            self._handles += [
                outer.register_forward_pre_hook(self._hook(outer, self._hide), prepend=True),
                inner.register_forward_pre_hook(self._hook(inner, begun)),
                inner.register_forward_hook(self._hook(inner, left), prepend=True),
                outer.register_forward_hook(self._hook(outer, self._show), always_call=True),
            ]

    def detach(self) -> None:
        self._tape.blind = False
        while self._handles:
            self._handles.pop().remove()

    def _hook(self, module: nn.Module, function: Callable[..., Any]) -> LocalHook:
        return LocalHook(module, function, self._failed)

    def _hide(self, *_: Any) -> None:
        self._tape.blind = True

    def _show(self, *_: Any) -> None:
        self._tape.blind = False

    def _failed(self, error: Exception) -> None:
        self._tape.guard.keep(error)
