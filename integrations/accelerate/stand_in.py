"""What stands before an object of the user's."""

from __future__ import annotations

from typing import Any


class StandIn:
    """Is the original in all that a subclass does not override: its length, attributes read and set.

    Args:
        original: the user's; its attributes are not hidden by ours.
    """

    def __init__(self, original: Any) -> None:
        self.__dict__["_original"] = original

    def __len__(self) -> int:
        return len(self._original)

    def __getattr__(self, name: str) -> Any:
        if name == "_original":  # while unpickling in a worker
            raise AttributeError(name)
        return getattr(self._original, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._original, name, value)
