"""Models compiled by torch.compile: their layers make calls of their own only while they run uncompiled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from diffhook.compat import deepspeed, fsdp
from diffhook.compat.torch import compiler_is_loaded, has_compiled_call, own_children


def is_compiled(model: nn.Module) -> bool:
    """Whether the model or a part of it is compiled, by ``torch.compile(module)`` or ``module.compile()``."""
    return compiler_is_loaded() and any(map(has_compiled_call, model.modules()))


def without_wrappers(model: nn.Module) -> nn.Module:
    """The model inside of the wrappers of DDP, FSDP, DeepSpeed and ``torch.compile``."""
    return _nested(model)[-1]


def holder(model: nn.Module) -> nn.Module:
    """What holds the model's parameters: FSDP's or DeepSpeed's wrapper around it, or the model itself."""
    found = _nested(model)
    return next((wrapper for wrapper in found if _wraps(wrapper)), found[-1])


def _wraps(model: nn.Module) -> bool:
    return fsdp.wraps(model) or deepspeed.wraps(model)


def compiled_wrapper(model: nn.Module) -> nn.Module | None:
    """The outermost of the wrappers that ``torch.compile`` has put around the model, if there is one."""
    return next((wrapper for wrapper in _nested(model) if "_orig_mod" in own_children(wrapper)), None)


def _nested(model: nn.Module) -> list[nn.Module]:
    """The wrappers, from the outermost, and what they hold."""
    found = [model]
    while True:
        if "_orig_mod" in own_children(model):
            model = model.get_submodule("_orig_mod")
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel) or _wraps(model):
            model = model.module  # type: ignore[assignment]
        else:
            return found
        found.append(model)


class _Stance:
    """The compiler's, which is one for the process: back to what it was when the last one has left."""

    def __init__(self) -> None:
        self._inside = 0
        self._set: Any = None

    def enter(self) -> None:
        if self._set is None:
            self._set = torch.compiler.set_stance("force_eager")
        self._inside += 1

    def leave(self) -> None:
        self._inside -= 1
        if self._set is not None and not self._inside:
            self._set.__exit__(None, None, None)
            self._set = None


_stance = _Stance()


@contextmanager
def uncompiled() -> Iterator[None]:
    """While entered, all compiled functions of the process run as they were written, layer by layer."""
    _stance.enter()
    try:
        yield
    finally:
        _stance.leave()
