"""Errors of ours inside someone else's forward and backward."""

from __future__ import annotations


class Guard:
    """Keeps the first error of a pass for its end; training goes on.

    Entry points of hooks catch for themselves, so that no call of ours lies outside of the ``try``.

    Attributes:
        error: the first error of the pass, or None.
    """

    def __init__(self) -> None:
        self.error: Exception | None = None

    def keep(self, error: Exception) -> None:
        self.error = self.error or error
