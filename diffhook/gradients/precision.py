"""The precision that hooks compute in."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
from torch import Tensor

_NOTHING = nullcontext()


def exactly(tensor: Tensor) -> AbstractContextManager[object]:
    """No gradients of gradients, and no autocast, which would round the products (about 1e-3)."""
    kind = tensor.device.type
    rounds = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    if not torch.is_grad_enabled() and not rounds:
        return _NOTHING  # as in every ordinary backward; contexts would cost as much as a small layer
    stack = ExitStack()
    stack.enter_context(torch.no_grad())
    if rounds:
        stack.enter_context(torch.autocast(kind, enabled=False))
    return stack
