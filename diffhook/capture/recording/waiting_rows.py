"""Rows that wait for their optimiser step, and then until nobody can call them back."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from diffhook.log import Rows


class WaitingRows:
    """Rows are staged, until their step is taken or lost, and held, until they may be written.

    Attributes:
        holding: whether complete rows stay held when the next are complete.
    """

    def __init__(self) -> None:
        self.holding = False
        self._staged: list[Rows] = []
        self._layer: str | None = None  # where the step's backward first met what is not finite
        self._held: list[tuple[Rows, str | None]] = []

    def __len__(self) -> int:
        """Rows that wait for their step."""
        return sum(len(part["sample"]) for part in self._staged)

    def stage(self, rows: Rows, layer: str | None) -> None:
        """Rows of one pass.

        Args:
            layer: the first one whose gradients are not finite.
        """
        self._staged.append(rows)
        self._layer = self._layer or layer

    def complete(self, lr: float) -> None:
        """Their step was taken with a learning rate, or skipped with 0."""
        if not self._staged:
            return
        rows = {name: np.concatenate([part[name] for part in self._staged]) for name in self._staged[0]}
        rows["lr"] = np.full(len(rows["sample"]), lr, np.float32)
        self._held.append((rows, self._layer))
        self.forget_staged()

    def forget_staged(self) -> int:
        """Returns of how many passes."""
        passes = len(self._staged)
        self._staged.clear()
        self._layer = None
        return passes

    def forget_held(self) -> None:
        self._held.clear()
        self.holding = False

    def released(self) -> Iterator[tuple[Rows, str | None]]:
        """The rows that were held, each step's with the layer that it told."""
        self.holding = False
        held, self._held = self._held, []
        yield from held
