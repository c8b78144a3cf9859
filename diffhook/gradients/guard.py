"""Our code inside someone else's forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Guard:
    """Runs our part of a hook: an error is kept for the end of the pass, and training goes on.

    Attributes:
        error: the first error of the pass.
    """

    def __init__(self) -> None:
        self.error: Exception | None = None

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        """What ``function`` returns; None if it fails, or if something has failed before."""
        if self.error is not None:
            return None
        try:
            return function(*args)
        except Exception as error:
            self.keep(error)
            return None

    def always(self, function: Callable[..., Any], *args: Any) -> None:
        """Run what undoes something, also after an error."""
        try:
            function(*args)
        except Exception as error:
            self.keep(error)

    def keep(self, error: Exception) -> None:
        """The first error of a pass counts."""
        self.error = self.error or error
