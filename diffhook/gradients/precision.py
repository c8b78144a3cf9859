"""The precision that hooks compute in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

_NOTHING = nullcontext()


def exactly(tensor: Tensor) -> AbstractContextManager[object]:
    """No gradients of gradients, no autocast, which would round the products (about 1e-3), and no TF32."""
    kind = tensor.device.type
    rounds = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    if not torch.is_grad_enabled() and not rounds and kind != "cuda":
        return _NOTHING  # as in every ordinary backward; contexts would cost as much as a small layer
    stack = ExitStack()
    stack.enter_context(torch.no_grad())
    if rounds:
        stack.enter_context(torch.autocast(kind, enabled=False))
    if kind == "cuda":
        stack.enter_context(without_tf32())
    return stack


@contextmanager
def without_tf32() -> Iterator[None]:
    """Products of float32 are computed as such: by default cuDNN's convolutions are not, and good to 1e-3."""
    before = [(flags, name, getattr(flags, name)) for flags, name, _ in _flags()]
    try:
        for flags, name, exact in _flags():
            setattr(flags, name, exact)
        yield
    finally:
        for flags, name, value in before:
            setattr(flags, name, value)


def _flags() -> list[tuple[Any, str, object]]:
    """What says how float32 is multiplied, and what it says for as such. Who has set the newer names may not
    read the older ones."""
    products, convolutions = torch.backends.cuda.matmul, getattr(torch.backends.cudnn, "conv", None)
    if hasattr(convolutions, "fp32_precision"):
        return [(products, "fp32_precision", "ieee"), (convolutions, "fp32_precision", "ieee")]
    return [(products, "allow_tf32", False), (torch.backends.cudnn, "allow_tf32", False)]
