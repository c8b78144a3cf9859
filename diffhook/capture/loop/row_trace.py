"""Follows the rows of batches through the loop's own operations, to what the model is called on."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _pop_mode, _push_mode

from diffhook.capture.loop.row_codes import codes_after, fits, tensors_in


class RowTrace:
    """Sees the torch functions that the loop calls between a batch and its model, and what they do to rows.

    Loops fetch a batch ahead, keep latents, shuffle rows, join batches: that is followed here, exactly. What
    goes through numpy, compiled code or another thread is not known afterwards. Results are the loop's own,
    bit by bit; while it is off, nothing of this is in the way.

    Args:
        shield: through which all of ours runs.
    """

    def __init__(self, shield: Callable[..., Any]) -> None:
        self._codes: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}
        self._mode = _Mode(shield, weakref.WeakMethod(self._called))
        self._thread: int | None = None  # in which the mode is

    def start(self) -> None:
        """See every torch function of this thread, until :meth:`stop`."""
        if self._thread is None:
            self._thread = threading.get_ident()
            _put_lowest(self._mode)
        self._mode.mute = False

    def stop(self) -> None:
        """See no more; what is known of tensors stays known."""
        self._mode.mute = True
        # Within a function that is being seen, such as Tensor.backward, torch would put the mode back.
        if self._thread == threading.get_ident() and not self._mode.depth:
            self._thread = None
            _take_off(self._mode)

    def note(self, tensor: Tensor, codes: Tensor | None) -> None:
        """Say what is known of a tensor's rows."""
        key = id(tensor)
        if codes is None:
            self._codes.pop(key, None)
            return
        table = self._codes

        def forget(gone: weakref.ref[Tensor]) -> None:
            if key in table and table[key][0] is gone:
                del table[key]

        table[key] = (weakref.ref(tensor, forget), codes)

    def codes(self, tensor: Tensor) -> Tensor | None:
        """What is known of a tensor's rows: codes as in :mod:`diffhook.capture.loop.row_codes`."""
        held = self._codes.get(id(tensor))
        return held[1] if held is not None and held[0]() is tensor else None

    def codes_of_call(self, values: Iterable[Any]) -> Tensor | None:
        """(B, 2) codes of the rows that a model is called on: of its first argument that tells."""
        for value in values:
            listed = isinstance(value, tuple | list)
            found = [self._rows_of(tensor, listed) for tensor in tensors_in([value])]
            known = [codes for codes in found if codes is not None]
            if known and len(known) == len(found):
                return torch.cat(known)
        return None

    def _rows_of(self, tensor: Tensor, listed: bool) -> Tensor | None:
        """(B, 2); a sample in a list of samples may have no axis of rows."""
        codes = self.codes(tensor)
        if codes is None or codes.dim() > 2 or not fits(codes, tensor):
            return None
        if codes.dim() == 2:
            return codes
        return codes[None] if listed or (tensor.dim() and len(tensor) == 1) else None

    def _called(self, *call: Any) -> None:
        with torch._C.DisableTorchFunction():  # another hook's trace need not see what this one does
            try:
                self._follow(*call)
            except Exception:
                self._codes.clear()  # rather nothing than something wrong
                raise

    def _follow(self, function: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        name = getattr(function, "__name__", "")
        for tensor, codes in codes_after(name, args, kwargs, result, self.codes):
            before = self.codes(tensor)
            if codes is before:
                continue
            base = tensor._base
            if base is not None and before is not None and (codes is None or not torch.equal(codes, before)):
                self.note(base, None)  # written to through a view
            self.note(tensor, codes)


class _Mode(TorchFunctionMode):
    """Calls every function as it is, and tells of the call.

    Attributes:
        mute: tell nothing.
        depth: calls under way.
    """

    def __init__(self, shield: Callable[..., Any], tell: weakref.WeakMethod[Callable[..., None]]) -> None:
        super().__init__()
        self._shield = shield
        self.mute, self.depth = True, 0
        self._tell = tell

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.depth += 1
        try:
            result = func(*args, **(kwargs or {}))
        finally:
            self.depth -= 1
        if self.mute or torch.compiler.is_compiling():
            return result
        if isinstance(result, Tensor | tuple | list) or func is Tensor.__setitem__:
            tell = self._tell()
            if tell is not None:
                self._shield(tell, func, args, kwargs or {}, result)
        return result


def _put_lowest(mode: TorchFunctionMode) -> None:
    """Under all modes of the loop, each of which takes off what is uppermost when it ends. Only that of
    ``torch.set_default_device``, which ends by taking off the lowest, stays below."""
    above = [_pop_mode() for _ in range(torch._C._len_torch_function_stack())]
    if above and above[-1] is getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None):
        _push_mode(above.pop())
    for one in (mode, *reversed(above)):
        _push_mode(one)


def _take_off(mode: TorchFunctionMode) -> None:
    others = [_pop_mode() for _ in range(torch._C._len_torch_function_stack())]
    for one in reversed(others):
        if one is not mode:
            _push_mode(one)
