"""Module hooks that stay with the module they were made for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class LocalHook:
    """A hook that does nothing on copies of its module.

    Training scripts copy models (EMA) and pickle them; a hook that is a bound method would take its
    owner along, with threads and open files.

    Args:
        module: whose hook it is.
        function: called as the hook.
        on_error: called with an error of ``function``, which then does not reach the module's caller
            unless raised again; None lets it pass.
    """

    def __init__(
        self,
        module: nn.Module | None,
        function: Callable[..., Any] | None,
        on_error: Callable[[Exception], object] | None = None,
    ) -> None:
        self._module = module
        self._function = function
        self._on_error = on_error

    def __call__(self, module: nn.Module, *args: Any) -> Any:
        if self._function is None or module is not self._module:
            return None
        try:
            return self._function(module, *args)
        except Exception as error:
            if self._on_error is None:
                raise
            self._on_error(error)
            return None

    def __deepcopy__(self, memo: dict[int, Any]) -> LocalHook:
        return LocalHook(None, None)

    def __reduce__(self) -> Any:
        return LocalHook, (None, None)
