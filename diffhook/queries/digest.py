"""A digest of what a query was computed from, so that the same is not computed again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def digest(*parts: Any) -> str:
    """Hex digest of nested tensors, modules and JSON-like values; equal for equal content.

    Of a module the parameters that are not trained count: the others come from the snapshots.
    """
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        _feed(state, part)
    return state.hexdigest()


def _feed(state: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        state.update(f"tensor {value.dtype} {tuple(value.shape)} ".encode())
        state.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    elif isinstance(value, nn.Module):
        frozen = {n: p for n, p in value.named_parameters() if not p.requires_grad}
        _feed(state, {**frozen, **dict(value.named_buffers())})
    elif isinstance(value, Mapping):
        state.update(f"mapping {len(value)} ".encode())
        for key in sorted(value):
            _feed(state, str(key))
            _feed(state, value[key])
    elif isinstance(value, list | tuple):
        state.update(f"list {len(value)} ".encode())
        for item in value:
            _feed(state, item)
    else:
        state.update(json.dumps(value, default=str).encode() + b" ")
