"""Module hooks that stay with the module they were made for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class LocalHook:
    """A hook that does nothing on copies of its module.

    Training scripts copy models (EMA) and pickle them; a hook that is a bound method would take its
    owner along, with threads and open files.
    """

    def __init__(self, module: nn.Module | None, function: Callable[..., Any] | None) -> None:
        self._module = module
        self._function = function

    def __call__(self, module: nn.Module, *args: Any) -> Any:
        if self._function is None or module is not self._module:
            return None
        return self._function(module, *args)

    def __deepcopy__(self, memo: dict[int, Any]) -> LocalHook:
        return LocalHook(None, None)

    def __reduce__(self) -> Any:
        return LocalHook, (None, None)
