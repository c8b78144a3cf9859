"""torch's. Autograd's state and modules' own dictionaries have no public face, or one that costs too much."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.nn.modules import module
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.modules.batchnorm import _NormBase as NormBase
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode_stack,
    _pop_mode,
    _push_mode,
)
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data.dataloader import _BaseDataLoaderIter as LoaderIterator
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

__all__ = [
    "BatchNorm",
    "LoaderIterator",
    "NormBase",
    "WeakIdKeyDictionary",
    "compiler_is_loaded",
    "every_modules_hook",
    "fetched_dataset",
    "function_modes",
    "gradient_hooks",
    "has_compiled_call",
    "hook_first",
    "in_backward",
    "is_custom",
    "own_children",
    "own_parameters",
    "padding_amounts",
    "process_store",
    "put_function_mode_lowest",
    "saved",
    "take_off_function_mode",
    "tree_leaves",
    "tree_map",
    "view_base",
    "without_function_modes",
]


# ── autograd ──────────────────────────────────────────────────────────────────────────────────────


def in_backward() -> bool:
    """Whether autograd is running, as it is while a checkpointed block is recomputed."""
    return bool(torch._C._current_graph_task_id() != -1)


def is_custom(node: Any) -> bool:
    """Whether a node of autograd's graph is that of a ``torch.autograd.Function`` written in Python."""
    return isinstance(node, torch.autograd.function.BackwardCFunction)


def saved(node: Any, name: str) -> Any:
    """What a node of autograd's graph saved of its operation: "self", "other", "target", "exponent"; None for
    a node of another kind or version, or whose tensors were freed."""
    try:
        return getattr(node, f"_saved_{name}")
    except (AttributeError, RuntimeError):
        return None


def view_base(tensor: Tensor) -> Tensor | None:
    """The tensor that this one is a view of."""
    return tensor._base


def gradient_hooks(tensor: Tensor) -> int:
    """How many hooks may change the tensor's gradient. Public methods add such hooks, and list none."""
    return len(tensor._backward_hooks or ())


def hook_first(tensor: Tensor, hook: Callable[[Tensor], Tensor | None]) -> None:
    """Have ``hook`` change a tensor's gradient before the hooks that are there see it. In public, hooks are
    called in the order in which they came."""
    before = dict(tensor._backward_hooks or {})
    tensor.register_hook(hook)
    hooks = tensor._backward_hooks
    assert hooks is not None
    added = {key: own for key, own in hooks.items() if key not in before}
    hooks.clear()
    hooks.update(added)
    hooks.update(before)


# ── modules ───────────────────────────────────────────────────────────────────────────────────────


def own_parameters(module: nn.Module) -> Mapping[str, nn.Parameter | None]:
    """A module's own, by attribute. ``named_parameters`` leaves out the second name of a shared one."""
    return module._parameters


def own_children(module: nn.Module) -> Mapping[str, nn.Module | None]:
    """Likewise of modules."""
    return module._modules


def compiler_is_loaded() -> bool:
    """Whether anything can be compiled. To import the compiler takes seconds."""
    return "torch._dynamo.eval_frame" in sys.modules


def has_compiled_call(module: nn.Module) -> bool:
    """Whether a module's call is compiled, by ``torch.compile(module)`` or ``module.compile()``. That it is a
    wrapper shows in its class, that it was compiled in place nowhere in public."""
    wrapper = sys.modules["torch._dynamo.eval_frame"].OptimizedModule
    return isinstance(module, wrapper) or module._compiled_call_impl is not None


def padding_amounts(convolution: Any) -> Sequence[int]:
    """What a convolution pads its input by, last axis first, where it is not symmetric zeros."""
    amounts: Sequence[int] = convolution._reversed_padding_repeated_twice
    return amounts


def every_modules_hook(hook: Callable[..., Any]) -> RemovableHandle:
    """Have ``hook`` called with (module, args, kwargs, output) after the calls of all modules, failed ones as
    well. torch itself never forgets such a hook, and compiled modules warn of it."""
    handle = module.register_module_forward_hook(hook, with_kwargs=True, always_call=True)
    handle.extra_dict_ref = (*handle.extra_dict_ref, weakref.ref(module._global_forward_hooks_with_kwargs))
    return handle


# ── function modes ────────────────────────────────────────────────────────────────────────────────


def function_modes() -> int:
    """How many are on."""
    return int(torch._C._len_torch_function_stack())


def without_function_modes() -> AbstractContextManager[Any]:
    """Operations that no mode sees."""
    found: AbstractContextManager[Any] = torch._C.DisableTorchFunction()
    return found


def put_function_mode_lowest(mode: TorchFunctionMode) -> None:
    """Under all modes that are on, each of which takes off what is uppermost when it ends. Only that of
    ``torch.set_default_device``, which ends by taking off the lowest, stays below."""
    others = _without(mode)
    device = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
    below = [one for one in others[:1] if one is device]
    _stack([*below, mode, *others[len(below) :]])


def take_off_function_mode(mode: TorchFunctionMode) -> None:
    """From wherever it lies."""
    _stack(_without(mode))


def _without(mode: TorchFunctionMode) -> list[TorchFunctionMode]:
    """All other modes that are on, the lowest first."""
    return [one for one in _get_current_function_mode_stack() if one is not mode]


def _stack(modes: list[TorchFunctionMode]) -> None:
    """Have these on, the lowest first. An error of ours comes before the first is moved or not at all."""
    for _ in range(torch._C._len_torch_function_stack()):
        _pop_mode()
    for one in modes:
        _push_mode(one)


# ── loaders ───────────────────────────────────────────────────────────────────────────────────────


def fetched_dataset(iterator: LoaderIterator) -> Any:
    """The dataset that a DataLoader's iterator goes over."""
    return iterator._dataset


# ── processes ─────────────────────────────────────────────────────────────────────────────────────


def process_store(name: str) -> Any:
    """A part, by its name, of the key-value store by which the default group's processes have met. To ask
    there costs no collective, which a process that is behind would hold up."""
    return distributed_c10d.PrefixStore(name, distributed_c10d._get_default_store())
