"""Module hooks that stay with the module they were made for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from diffhook.gradients.guard import Guarded


class LocalHook(Guarded):
    """A hook that does nothing on copies of its module.

    Training scripts copy models (EMA) and pickle them; a hook that is a bound method would take its
    owner along, with threads and open files.

    Args:
        module: whose hook it is; None: nobody's.
        function: called as the hook.
        on_error: called with an error of ``function``, which then does not reach the module's caller
            unless raised again.
    """

    def __init__(
        self,
        module: nn.Module | None,
        function: Callable[..., Any],
        on_error: Callable[[Exception], object],
    ) -> None:
        self._module = module
        self._function = function
        self._on_error = on_error

    def run(self, module: nn.Module, *args: Any) -> Any:
        return self._function(module, *args) if module is self._module else None

    def failed(self, error: Exception, *_: Any) -> None:
        self._on_error(error)

    def __deepcopy__(self, memo: dict[int, Any]) -> LocalHook:
        return _nobodys_hook()

    def __reduce__(self) -> Any:
        return _nobodys_hook, ()


def _nobodys_hook() -> LocalHook:
    return LocalHook(None, _nothing, _nothing)


def _nothing(*_: Any) -> None:
    pass
