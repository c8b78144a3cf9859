"""Whether the trained weights are those that the last step left: loops may end with others."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from diffhook.gradients.sharding import is_sharded

_SAMPLED = 8  # parameters …
_VALUES = 64  # … and values of each, which stand for all: who loads weights loads them all
_CALLS = 3


class SteppedWeights:
    """Compares a few values with what a step has left of them.

    Many loops end with an average (EMA) copied into the model, or with their best checkpoint. Of loops that
    change weights after each step themselves, as clipping does, which the first training calls show, nothing
    is said; nor of embeddings, whose rows may be put back, and of sharded models. Nobody waits for a device
    before :attr:`loaded` is asked for.

    Args:
        model: that is trained.
        parameters: name → parameter, of those that count.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        fit = [p for p in parameters.values() if p.numel() and id(p) not in tables]
        alike = [p for p in fit if (p.device, p.dtype) == (fit[0].device, fit[0].dtype)]
        self._sampled = [] if is_sharded(model) else alike[:: max(len(alike) // _SAMPLED, 1)][:_SAMPLED]
        self._left: Tensor | None = None  # by the last step
        self._changed: list[Tensor] = []  # by the loop, as its first calls after a step show

    def stepped(self) -> None:
        """A step is over."""
        if self._sampled:
            self._left = self._look()

    def called(self) -> None:
        """The model is called to be trained."""
        if self._left is not None and len(self._changed) < _CALLS:
            self._changed.append(self._differ(self._left))

    @property
    def loaded(self) -> bool:
        """Whether the loop has put others in the place of the weights since its last step."""
        if self._left is None or any(map(bool, self._changed)):
            return False
        return bool(self._differ(self._left))

    def _differ(self, left: Tensor) -> Tensor:
        now = self._look()
        return ((left != now) & ~(left.isnan() & now.isnan())).any()

    def _look(self) -> Tensor:
        rows = [parameter.detach() for parameter in self._sampled]
        while any(row.dim() > 1 for row in rows):
            rows = [row[0] if row.dim() > 1 else row for row in rows]
        return torch.cat([row.reshape(-1)[:_VALUES] for row in rows])
