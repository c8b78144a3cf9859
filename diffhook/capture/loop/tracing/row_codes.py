"""What a torch function does to the rows of a batch.

A function that moves rows does to their codes what it does to the tensor. Of any other function, a result of
as many rows as an argument holds the argument's rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffhook.capture.loop.tracing.codes import UNKNOWN, Known, agreed, carried, fits, tensors_in, unknown
from diffhook.capture.loop.tracing.row_mixing import PRODUCTS, chosen, multiplied, summed, transforms_rows

_MADE_ANEW = frozenset({"new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"})
_REGROUPING = frozenset(
    {"view", "reshape", "flatten", "unflatten", "squeeze", "view_as", "reshape_as", "ravel"}
)
_TURNING = frozenset(
    {"permute", "transpose", "movedim", "moveaxis", "swapaxes", "swapdims", "t", "adjoint", "__get__"}
)
_SHUFFLING = {
    **{"sort": -1, "argsort": -1, "topk": -1, "gather": 0, "scatter": 0, "diff": -1},
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp"), 0),
}  # and their usual axis
_LOSING = frozenset(
    {
        *("msort", "rot90", "take", "take_along_dim", "masked_select", "masked_scatter", "index_add"),
        *("index_copy", "index_put", "index_reduce", "put", "as_strided", "block_diag", "tensordot", "kron"),
        *("scatter_add", "scatter_reduce", "select_scatter", "slice_scatter", "diagonal_scatter"),
    }
)
_TEMPLATED = frozenset({"view_as", "reshape_as", "expand_as", "resize_as", "type_as", "to"})  # by another
_ALONG_AXIS = frozenset({"select", "narrow", "index_select", "repeat_interleave"})
_PARTING = frozenset({"chunk", "split", "tensor_split", "unbind", "split_with_sizes"})
_JOINING = frozenset({"cat", "concat", "concatenate"})


def codes_after(
    name: str, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any, known: Known
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The codes of a function's results.

    Args:
        name: of the function.
        args, kwargs: what it was called with.
        result: what it returned.
        known: gives the codes of an argument; None: nothing is known of its rows.

    Yields:
        Each tensor that was made or written to, and its codes; None where nothing is known.
    """
    first: Any = args[0] if args else kwargs.get("input")
    if name == "__setitem__":
        yield from _set(first, args[1], args[2], known)
        return
    if name == "__set__":  # of .data
        yield first, known(args[1]) if isinstance(args[1], Tensor) else None
        return
    name = name if name.startswith("__") or name == "copy_" else name.rstrip("_")
    results = [r for r in (result if isinstance(result, tuple | list) else [result]) if isinstance(r, Tensor)]
    if name in _MADE_ANEW or name.endswith("_like"):
        yield from ((one, None) for one in results)
        return
    own = known(first) if isinstance(first, Tensor) else None
    if name in _PARTING and own is not None and _axis(name, first, args, kwargs) == 0:
        yield from zip(results, _parted(name, own, results), strict=True)
        return
    for one in results:
        codes = _one(name, first, own, args, kwargs, one, known)
        yield one, codes if codes is None or fits(codes, one) else None


def _one(
    name: str,
    first: Any,
    own: Tensor | None,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    result: Tensor,
    known: Known,
) -> Tensor | None:
    if name in _JOINING or name == "stack":
        return _joined(name, first if args else kwargs.get("tensors"), args, kwargs, result, known)
    if name == "copy_":
        return known(args[1]) if isinstance(args[1], Tensor) else None
    if name in _TEMPLATED:
        args, kwargs = args[:1], {}
    if name in PRODUCTS:
        return multiplied(name, args, result, known)
    if name in _LOSING and any(
        codes is not None and codes.dim() > 1 for codes in map(known, tensors_in((*args, *kwargs.values())))
    ):
        return None
    if name.startswith("fft_") and own is not None and transforms_rows(name, first, args, kwargs):
        return None
    if name == "einsum":
        return summed(args, result, known)
    if name == "where" and len(args) == 3:
        return chosen(args, result, known)
    if own is None:
        return carried(args, kwargs, result, known)
    if name in _SHUFFLING and own.dim() > 1:
        moved = _axis(name, first, args, kwargs, default=_SHUFFLING[name])
        return None if moved == 0 else carried(args, kwargs, result, known)
    mover = _MOVERS.get(name)
    if mover is not None:
        return mover(own, first, args, kwargs)
    if name in _REGROUPING:
        return _regrouped(own, result)
    if name in _TURNING and (own.dim() > 1 or result.numel() != first.numel()):
        kept = own.dim() > 1 and result.dim() and len(result) == len(first)
        return own if kept and (len(first) == 1 or result.stride(0) == first.stride(0)) else None
    if name in _ALONG_AXIS and own.dim() > 1 and _axis(name, first, args, kwargs) == 0:
        return _along(name, own, args, kwargs)
    return carried(args, kwargs, result, known)


# ── functions that move rows ──────────────────────────────────────────────────────────────────────


def _indexed(codes: Tensor, _: Tensor, args: Sequence[Any], __: Mapping[str, Any]) -> Tensor | None:
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    if not index or index[0] is Ellipsis:
        return codes
    if index[0] is None:
        return codes[None]
    if codes.dim() == 1:
        return codes
    if codes.dim() == 3 and len(index) > 1 and all(isinstance(i, int | slice) for i in index[:2]):
        return codes[index[0], index[1]] if isinstance(index[0], int) else codes[index[0]][:, index[1]]
    rows = index[0].cpu() if isinstance(index[0], Tensor) else index[0]
    if isinstance(rows, Tensor) and rows.dtype == torch.bool and rows.dim() > 1:
        return None
    found: Tensor = codes[rows]
    return found


def _set(target: Tensor, index: Any, value: Any, known: Known) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Of ``target[index] = value``."""
    before, new = known(target), known(value) if isinstance(value, Tensor) else None
    if before is None and new is None:
        return
    parts = index if isinstance(index, tuple) else (index,)
    place = _rows_at(parts, target)
    if place is None or (before is not None and before.dim() != 2):
        yield target, None
        return
    codes = unknown(len(target)) if before is None else before.clone()
    held = codes[place]
    written = torch.full_like(held, UNKNOWN) if new is None or new.shape != held.shape else new
    if all(one is Ellipsis or _is_all(one) for one in parts[1:]):  # whole rows
        codes[place] = written
    elif new is not None:  # parts of them: what is of no sample leaves them theirs
        codes[place] = written if before is None else agreed(held, written)
    yield target, codes


def _rows_at(parts: Sequence[Any], target: Tensor) -> Any:
    """The index that chooses rows, for codes; None where that is not clear."""
    if not parts or not target.dim() or any(one is None for one in parts):
        return None
    rows = parts[0].cpu() if isinstance(parts[0], Tensor) else parts[0]
    if rows is Ellipsis:
        return slice(None) if len(parts) <= target.dim() else None
    return None if isinstance(rows, Tensor) and rows.dtype == torch.bool and rows.dim() > 1 else rows


def _is_all(one: Any) -> bool:
    return isinstance(one, slice) and one == slice(None)


def _flipped(codes: Tensor, tensor: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    given = kwargs.get("dims", args[1:])
    axes = given if isinstance(given, tuple | list) else (given,)
    axes = axes[0] if axes and isinstance(axes[0], tuple | list) else axes
    if codes.dim() == 1 or 0 not in [axis % tensor.dim() for axis in axes]:
        return codes
    return codes.flip(0)


def _rolled(codes: Tensor, tensor: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    values = dict(zip(("shifts", "dims"), args[1:], strict=False)) | dict(kwargs)
    shifts, dims = values["shifts"], values.get("dims", ())
    pairs = zip(_several(shifts), _several(dims), strict=False)
    by = sum(shift for shift, axis in pairs if axis % tensor.dim() == 0)
    if codes.dim() == 1:
        return codes
    return codes.roll(by, 0) if _several(dims) else None  # without an axis, numbers roll from row to row


def _repeated(codes: Tensor, tensor: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    sizes = _sizes(args, kwargs, "repeats", "dims")
    if codes.dim() != 2 or len(sizes) != tensor.dim():
        return codes if codes.dim() == 1 else None
    return codes.repeat(sizes[0], 1)


def _expanded(codes: Tensor, tensor: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    sizes = _sizes(args, kwargs, "size", "sizes")
    if codes.dim() != 2 or len(sizes) != tensor.dim() or len(tensor) != 1 or sizes[0] in (-1, 1):
        return codes if codes.dim() == 1 or len(sizes) == tensor.dim() else None
    return codes.expand(sizes[0], 2)


def _unsqueezed(codes: Tensor, tensor: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    axis = kwargs["dim"] if "dim" in kwargs else args[1]
    return codes[None] if axis % (tensor.dim() + 1) == 0 else codes


_MOVERS: dict[str, Callable[[Tensor, Tensor, Sequence[Any], Mapping[str, Any]], Tensor | None]] = {
    "__getitem__": _indexed,
    "flip": _flipped,
    "roll": _rolled,
    "repeat": _repeated,
    "tile": _repeated,
    "expand": _expanded,
    "unsqueeze": _unsqueezed,
}


def _along(name: str, codes: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    names = {
        "select": ("dim", "index"),
        "narrow": ("dim", "start", "length"),
        "index_select": ("dim", "index"),
        "repeat_interleave": ("repeats", "dim"),
    }[name]
    values = dict(zip(names, args[1:], strict=False)) | {k: v for k, v in kwargs.items() if k in names}
    values = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in values.items()} | {"dim": 0}
    found: Tensor = getattr(torch, name)(codes, **values)
    return found


def _parted(name: str, codes: Tensor, results: Sequence[Tensor]) -> Iterator[Tensor | None]:
    """The parts follow one another."""
    if name == "unbind":
        yield from (codes if codes.dim() > 1 else [None] * len(results))
        return
    start = 0
    for part in results:
        yield codes[start : start + len(part)] if codes.dim() > 1 else codes
        start += len(part)


def _joined(
    name: str,
    tensors: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    result: Tensor,
    known: Known,
) -> Tensor | None:
    parts = [part for part in tensors or () if isinstance(part, Tensor)]
    found = [known(part) for part in parts]
    if all(codes is None for codes in found):
        return None
    axis = kwargs.get("dim", args[1] if len(args) > 1 else 0) % result.dim()
    if axis:
        return carried(parts, {}, result, known)
    leads = {codes.dim() for codes in found if codes is not None}
    if len(leads) > 1:
        return None
    (lead,) = leads
    if name != "stack" and lead != 2:
        return None
    whole = [
        unknown(*part.shape[: lead - 1]) if codes is None else codes
        for part, codes in zip(parts, found, strict=True)
    ]
    if len({codes.shape[1:] for codes in whole}) > 1:
        return None
    return torch.stack(whole) if name == "stack" else torch.cat(whole)


def _regrouped(codes: Tensor, result: Tensor) -> Tensor | None:
    """Of a function that keeps all numbers in order: rows are parted evenly, or joined with their like."""
    if codes.dim() == 1:
        return codes
    rows = codes.reshape(-1, 2)
    count = len(result) if result.dim() else 0
    if count and count % len(rows) == 0:
        return rows.repeat_interleave(count // len(rows), 0)
    if count and len(rows) % count == 0:
        groups = rows.reshape(count, -1, 2)
        if bool((groups == groups[:, :1]).all()):
            return groups[:, 0]
    if result.dim() > 1 and math.prod(result.shape[:2]) == len(rows):
        return rows.reshape(*result.shape[:2], 2)
    return None


# ── arguments ─────────────────────────────────────────────────────────────────────────────────────

_AXIS_AT = {
    "repeat_interleave": 2,
    "split": 2,
    "chunk": 2,
    "tensor_split": 2,
    "split_with_sizes": 2,
    "topk": 2,
}


def _axis(
    name: str, tensor: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any], default: int | None = 0
) -> int | None:
    """Which axis a function works along, counted from the front."""
    at = _AXIS_AT.get(name, 1)
    axis = kwargs["dim"] if "dim" in kwargs else args[at] if len(args) > at else default
    if name == "repeat_interleave" and "dim" not in kwargs and len(args) <= at:
        return None  # all numbers in a line
    return axis % max(tensor.dim(), 1) if isinstance(axis, int) else None


def _several(value: Any) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _sizes(args: Sequence[Any], kwargs: Mapping[str, Any], *names: str) -> tuple[int, ...]:
    given = next((kwargs[name] for name in names if name in kwargs), args[1:])
    given = given[0] if len(given) == 1 and isinstance(given[0], tuple | list) else given
    return tuple(given)
