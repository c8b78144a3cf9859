"""Follows the rows of batches through the loop's own operations, to what the model is called on."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from diffhook.capture.loop.identity.content import sampled
from diffhook.capture.loop.tracing.codes import fits, tensors_in
from diffhook.capture.loop.tracing.row_codes import codes_after
from diffhook.compat.torch import put_function_mode_lowest, take_off_function_mode, without_function_modes

_WRITERS = (Tensor.__setitem__, Tensor.data.__set__)  # type: ignore[attr-defined]  # return nothing
_EXPOSING = (Tensor.numpy, Tensor.__array__)  # memory in which others write, which torch does not see

_TOLD = frozenset({*_WRITERS, *_EXPOSING})


class _Noted(NamedTuple):
    """What is known of a tensor, as long as nobody writes to it: torch counts writes, through any view."""

    tensor: weakref.ref[Tensor]
    codes: Tensor
    version: int
    content: Tensor | None  # a part of it, where numpy shares the memory


class RowTrace:
    """Sees the torch functions that the loop calls between a batch and its model, and what they do to rows.

    Loops fetch a batch ahead, keep latents, shuffle rows, join batches: that is followed here, exactly. What
    goes through numpy, compiled code or another thread is not known afterwards. Results are the loop's own,
    bit by bit; while it is off, nothing of this is in the way.

    Args:
        shield: through which all of ours runs.
    """

    def __init__(self, shield: Callable[..., Any]) -> None:
        self._codes: dict[int, _Noted] = {}
        self._exposed: set[int] = set()  # addresses of memory that numpy shares
        self._mode = _Mode(shield, weakref.WeakMethod(self._called))
        self._thread: threading.Thread | None = None  # in which the mode is

    def start(self) -> None:
        """See every torch function of this thread, until :meth:`stop`."""
        if self._thread is None or not self._thread.is_alive():  # each epoch may have a thread of its own
            put_function_mode_lowest(self._mode)
            self._thread = threading.current_thread()
        self._mode.mute = False

    def stop(self) -> None:
        """See no more; what is known of tensors stays known."""
        self._mode.mute = True
        # Within a function that is being seen, such as Tensor.backward, torch would put the mode back.
        if self._thread is threading.current_thread() and not self._mode.depth:
            take_off_function_mode(self._mode)
            self._thread = None  # after it, so that the next stop tries again what an error has cut off

    @contextmanager
    def aside(self) -> Iterator[None]:
        """See nothing of what is done within."""
        seeing = self._thread is not None and not self._mode.mute
        self.stop()
        try:
            yield
        finally:
            if seeing:
                self.start()

    def note(self, tensor: Tensor, codes: Tensor | None) -> None:
        """Say what is known of a tensor's rows."""
        key = id(tensor)
        if codes is None:
            self._codes.pop(key, None)
            return
        table = self._codes

        def forget(gone: weakref.ref[Tensor]) -> None:
            if key in table and table[key].tensor is gone:
                del table[key]

        content = sampled(tensor) if self._exposed and _memory(tensor) in self._exposed else None
        table[key] = _Noted(weakref.ref(tensor, forget), codes, _version(tensor), content)

    def codes(self, tensor: Tensor, version: int | None = None) -> Tensor | None:
        """What is known of a tensor's rows: codes as in :mod:`diffhook.capture.loop.tracing.codes`.

        Args:
            version: of the tensor at the moment that is asked for; now, by default.
        """
        held = self._codes.get(id(tensor))
        if held is None or held.tensor() is not tensor:
            return None
        if held.version != (_version(tensor) if version is None else version):
            return None
        unchanged = held.content is None or torch.equal(held.content, sampled(tensor))
        return held.codes if unchanged else None

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
        with without_function_modes():  # another hook's trace need not see what this one does
            try:
                self._follow(*call)
            except Exception:
                self._codes.clear()  # rather nothing than something wrong
                raise

    def _follow(
        self, function: Any, args: Any, kwargs: dict[str, Any], result: Any, known: int | None
    ) -> None:
        first: Any = args[0] if args else None
        version = -1 if known is None else known  # of the first argument, before the call
        if function in _EXPOSING:
            self._expose(first)
            return
        was_written = isinstance(first, Tensor) and (_version(first) != version or function in _WRITERS)

        def before(tensor: Tensor) -> Tensor | None:
            return self.codes(tensor, version if tensor is first else None)

        name = getattr(function, "__name__", "")
        for tensor, codes in list(codes_after(name, args, kwargs, result, before)):
            if tensor is first and was_written:
                self._written(tensor, before(tensor), codes)
            self.note(tensor, codes)
        if was_written and self.codes(first) is None:
            self._written(first, None, None)

    def _written(self, tensor: Tensor, before: Tensor | None, codes: Tensor | None) -> None:
        """What shares a tensor's memory holds other rows now, unless the rows have stayed what they were."""
        same = before is codes or (before is not None and codes is not None and torch.equal(before, codes))
        version = _version(tensor)
        for other, held in self._sharing(tensor):
            if not same:
                self.note(other, None)
            elif held.version == version - 1:
                self.note(other, held.codes)

    def _sharing(self, tensor: Tensor) -> list[tuple[Tensor, _Noted]]:
        """What is known of others that lie in the same memory."""
        found = [(held.tensor(), held) for held in self._codes.values()]
        memory = _memory(tensor)
        return [(t, held) for t, held in found if t is not None and t is not tensor and _memory(t) == memory]

    def _expose(self, tensor: Tensor) -> None:
        """Others may write to this memory from now on: what is known of it holds while it is as it is now."""
        known = [(t, held.codes) for t, held in self._sharing(tensor) if self.codes(t) is not None]
        own = self.codes(tensor)
        if own is None and not known:
            return
        memory = _memory(tensor)
        if memory not in self._exposed:
            self._exposed.add(memory)
            weakref.finalize(tensor.untyped_storage(), self._exposed.discard, memory)
        for other, codes in [*known, (tensor, own)]:
            self.note(other, codes)


def _version_of_first(args: tuple[Any, ...]) -> int | None:
    with without_function_modes():
        return _version(args[0]) if args and isinstance(args[0], Tensor) else None


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _version(tensor: Tensor) -> int:
    """How often torch has seen a tensor's memory written to, through whatever view."""
    return 0 if tensor.is_inference() else tensor._version


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
        if torch.compiler.is_compiling():  # what follows must not become part of the loop's own graph
            return func(*args, **(kwargs or {}))
        version = None if self.mute else self._shield(_version_of_first, args)
        self.depth += 1
        try:
            result = func(*args, **(kwargs or {}))
        finally:
            self.depth -= 1
        if self.mute:
            return result
        if isinstance(result, Tensor | tuple | list) or func in _TOLD:
            tell = self._tell()
            if tell is not None:
                self._shield(tell, func, args, kwargs or {}, result, version)
        return result
