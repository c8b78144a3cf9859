"""Tensors as a safetensors file that is made while it is written, so that no copy of them all is needed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from diffhook.log import Content

_CHUNK = 16 << 20  # bytes of a tensor that are copied at once, from its device or into another precision

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.complex64: "C64",
}


def safetensors_of(
    tensors: Mapping[str, Tensor],
    *,
    like: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> Content:
    """The file of tensors as they are when it is written.

    Beside them, a chunk of 16 MiB is held in memory, or one tensor where it does not lie in one piece.

    Args:
        tensors: by name; asked for one by one.
        like: of the same shapes and precision, where to ask for ``tensors`` is to compute them.
        dtype: to write them in; None: each in its own.

    Raises:
        ValueError: a tensor of a kind that the format does not know.
    """
    shapes = tensors if like is None else like
    order = sorted(shapes, key=lambda name: (-_kind(shapes[name], dtype).itemsize, name))
    header, size = _header({name: shapes[name] for name in order}, dtype)

    def parts() -> Iterator[bytes | memoryview]:
        yield header
        for name in order:
            yield from _bytes_of(tensors[name].detach(), _kind(shapes[name], dtype))

    return Content(len(header) + size, parts)


def _kind(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype or tensor.dtype


def _header(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> tuple[bytes, int]:
    """The file's beginning, and how many bytes of tensors follow."""
    described: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        kind = _kind(tensor, dtype)
        if kind not in _NAMES:
            raise ValueError(f"{name} is of {kind}, which snapshots cannot keep")
        start, end = end, end + tensor.numel() * kind.itemsize
        described[name] = {"dtype": _NAMES[kind], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # what follows is aligned
    return len(text).to_bytes(8, "little") + text, end


def _bytes_of(tensor: Tensor, dtype: torch.dtype) -> Iterator[memoryview]:
    flat = tensor.contiguous().flatten()
    step = max(_CHUNK // dtype.itemsize, 1)
    for start in range(0, len(flat), step):
        part = flat[start : start + step].to(device="cpu", dtype=dtype)
        yield part.view(torch.uint8).numpy().data
