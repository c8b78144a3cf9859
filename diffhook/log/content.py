"""What a file is to hold, where it is too large to be held in memory first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Content:
    """Made part by part while it is written.

    Attributes:
        size: bytes in all.
        parts: makes them, anew at each call, since a write that fails is tried again.
        settled: whether they are the same whenever they are made; else what they are made of may change.
    """

    size: int
    parts: Callable[[], Iterator[bytes | memoryview]]
    settled: bool = False

    @classmethod
    def of(cls, content: bytes | Content) -> Content:
        """Bytes as content; content as it is."""
        if isinstance(content, Content):
            return content
        return cls(len(content), lambda: iter([content]), settled=True)

    def copied(self) -> Content:
        """The same, in memory."""
        return self if self.settled else Content.of(b"".join(self.parts()))
