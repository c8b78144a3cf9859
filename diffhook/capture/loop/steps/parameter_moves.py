"""Whether parameters have changed, for steps that no optimiser tells of."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from diffhook.gradients.sharding import own_share


class ParameterMoves:
    """Notes what parameters are at one moment, and says later whether they are others.

    Changes in place count up a version; those through ``.data`` do not, so the values' sums are kept as well.

    Args:
        parameters: the trained ones.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._noted = self._look()

    def note(self) -> None:
        """This is the moment."""
        self._noted = self._look()

    def moved(self) -> bool:
        """Whether any parameter has changed since."""
        return self._look() != self._noted

    def _look(self) -> tuple[int, list[float]]:
        shares = [own_share(p.detach()) for p in self._parameters]
        sums = torch.stack([share.sum(dtype=torch.float64).cpu() for share in shares]).nan_to_num()
        return sum(p._version for p in self._parameters), sums.tolist()
