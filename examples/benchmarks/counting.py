"""Counts what a GPU would be asked for, without one: kernels, operations, bytes, live memory."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from diffhook.gradients import host, products
from diffhook.gradients.tuning import Tuner

aten = torch.ops.aten

# An H100, as assumed and not measured: operations and bytes a second that real kernels reach.
BF16, FP32 = 500e12, 50e12
BANDWIDTH = 2.6e12
KERNEL = 2.5e-6  # seconds that a kernel takes at least

_NO_KERNEL = {
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten.detach.default,
    aten._unsafe_view.default,
    aten._local_scalar_dense.default,
}


@dataclass
class Count:
    """What a run has asked for.

    Attributes:
        launches: kernels, one for each operation that is no view; a convolution's backward counts once for
            every gradient that it computes.
        operations: multiplications and additions of matrix products, convolutions and attention.
        bytes: read and written by all kernels.
        seconds: the roofline's: of every kernel the longest of its arithmetic, its traffic and its launch.
        peak: bytes of tensors alive at once, those of the model left out.
        kinds: kind → (launches, seconds) of its share.
    """

    launches: int = 0
    operations: float = 0
    bytes: float = 0
    seconds: float = 0
    peak: int = 0
    kinds: dict[str, tuple[int, float]] = field(default_factory=dict)


class Counting(TorchDispatchMode):
    """While entered, every operation is counted into :attr:`count`, under :attr:`kind` where that is set."""

    def __init__(self) -> None:
        super().__init__()
        self.count = Count()
        self.kind: str | None = None
        self._alive = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        for tensor in tensors:
            self._allocate(tensor.untyped_storage())
        if func in _NO_KERNEL or func.is_view:
            return out
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        operations = _operations(func, args, kwargs, out)
        traffic = float(sum(map(_size, read)) + sum(map(_size, tensors)))
        half = all(tensor.dtype.itemsize <= 2 for tensor in read if tensor.is_floating_point())
        launches = sum(args[-1]) if func is aten.convolution_backward.default else 1
        seconds = max(operations / (BF16 if half else FP32), traffic / BANDWIDTH, launches * KERNEL)
        self._add(launches, operations, traffic, seconds)
        return out

    def _add(self, launches: int, operations: float, traffic: float, seconds: float) -> None:
        count = self.count
        count.launches += launches
        count.operations += operations
        count.bytes += traffic
        count.seconds += seconds
        if self.kind is not None:
            before = count.kinds.get(self.kind, (0, 0.0))
            count.kinds[self.kind] = before[0] + launches, before[1] + seconds

    def _allocate(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self._alive += size
        self.count.peak = max(self.count.peak, self._alive)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self._alive -= size


def _operations(func: Any, args: Any, kwargs: Any, out: Any) -> float:
    if func is aten.convolution_backward.default:
        return _of_convolution_backward(*args)
    if func is aten.bmm.dtype:
        func, args = aten.bmm.default, args[:2]
    counted = flop_registry.get(func.overloadpacket)
    return 0 if counted is None else float(counted(*args, **kwargs, out_val=out))


def _of_convolution_backward(grad: Tensor, inputs: Tensor, weight: Tensor, *rest: Any) -> float:
    """Torch's own count takes no notice of groups in the weight's gradient."""
    transposed, wanted = rest[4], rest[-1]
    places = (inputs if transposed else grad)[0, 0].numel() * len(grad)
    return 2.0 * places * weight.numel() * sum(wanted[:2])


def _size(tensor: Tensor) -> int:
    """Bytes that a kernel touches of it: a broadcast axis is read once."""
    count = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= length if stride else 1
    return count * tensor.element_size()


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *_: Any, **__: Any
) -> Tensor:
    """One fused kernel, as on a GPU; on meta tensors torch would take it apart. Masks are left out."""
    found: Tensor = aten._scaled_dot_product_flash_attention(query, key, value)[0]
    return found


def _least_seconds(tuner: Tuner, key: str, ways: Mapping[str, Any]) -> str:
    """In place of timing: the way that the roofline finds the fastest."""
    seconds = {}
    for name, way in ways.items():
        with Counting() as trial:
            way()
        seconds[name] = trial.count.seconds
    return min(seconds, key=seconds.__getitem__)


@contextmanager
def without_values() -> Iterator[None]:
    """The engine on meta tensors, which have shapes and no values: its checks find nothing wrong."""

    def read(values: Tensor) -> list[Any]:
        return torch.zeros(values.shape, dtype=values.dtype).tolist()

    chosen: dict[str, str] = {}

    def fastest(tuner: Tuner, key: str, ways: Mapping[str, Any]) -> str:
        if key not in chosen:
            with torch.utils._python_dispatch._disable_current_modes():
                chosen[key] = _least_seconds(tuner, key, ways)
        return chosen[key]

    with (
        mock.patch.object(host, "read", read),
        mock.patch.object(products, "_adds_up_in_float32", return_value=True),
        mock.patch.object(Tuner, "fastest", fastest),
        mock.patch.object(F, "scaled_dot_product_attention", _attention),
    ):
        yield
