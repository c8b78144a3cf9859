"""Whether captions or classes are dropped at times, as trainings for classifier-free guidance do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

DROPPED = ("encoder_hidden_states", "pooled_projections", "class_labels")
"""What may be."""

_CHANGED, _SAME = 0.1, 0.02  # relative differences: rounding, of halves too, is between neither
_VISITS = 64  # of samples that came before: of captions dropped one time in twenty, three changes or more
_KEPT = 16  # values of samples that have several


class Dropping:
    """Looks at samples that come again.

    One that has another caption each time may have several of its own, and each of its calls is right. One
    that has a caption now and then that others have as well, in place of theirs, had its own dropped.
    """

    def __init__(self) -> None:
        self.name = ""  #: the argument that is dropped; "": none was seen to be
        self._visits = 0
        self._several: list[tuple[str, int, Tensor]] = []  # name, sample, one of its values

    @property
    def looks(self) -> bool:
        """Whether further visits are to be looked at."""
        return self._visits < _VISITS

    def add(self, sample: int, row: int, now: Mapping[str, Any], then: Mapping[str, Any]) -> None:
        """A sample has come again.

        Args:
            row: of the sample in its call.
            now: conditions of that call, (B, …).
            then: its own before, (1, …).
        """
        self._visits += 1
        for name in DROPPED:
            of_call, before = now.get(name), then.get(name)
            if isinstance(of_call, Tensor) and isinstance(before, Tensor):
                values = [of_call[row : row + 1].detach().cpu(), before]
                if _differ(values[0], values[1], _CHANGED):
                    self._changed(name, sample, values)

    def _changed(self, name: str, sample: int, values: list[Tensor]) -> None:
        others = [kept for other, of, kept in self._several if other == name and of != sample]
        if any(not _differ(value, kept, _SAME) for value in values for kept in others):
            self.name = self.name or name
        if len(self._several) < _KEPT:
            self._several += [(name, sample, value) for value in values]


def _differ(one: Tensor, other: Tensor, tolerance: float) -> bool:
    """Whether by more than a part of their length. Those of several lengths are told elsewhere."""
    if one.shape != other.shape:
        return False
    if not one.is_floating_point():
        return not torch.equal(one, other)
    one, other = one.double(), other.double()
    return float((one - other).norm()) > tolerance * max(float(one.norm()), float(other.norm()))
