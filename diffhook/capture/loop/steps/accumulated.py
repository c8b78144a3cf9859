"""Whether the gradients that a backward has left are still there when the loop goes on."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from diffhook.gradients import host
from diffhook.gradients.sharding import own_share


class AccumulatedGradients:
    """Notes the parameters' ``.grad`` after a backward, and says later whether all of it was thrown away.

    Loops do that in many ways of which nobody tells: ``model.zero_grad()``, ``p.grad = None``,
    ``torch._foreach_zero_``. Values are looked at only where something was written since.

    Args:
        parameters: the trained ones.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = list(parameters)  # of sharded ones each process looks at its own share
        self._noted: tuple[int, int] | None = None  # id() and version of the first gradient there is
        self._suspected = False
        self._any: Tensor | bool = False  # whether one was not zero when they were suspected

    def note(self) -> None:
        """A backward has ended."""
        self._noted = self._look()

    def suspect(self) -> None:
        """Something may have been done to them; :meth:`are_gone` then reads what is found now."""
        noted, now = self._noted, self._look()
        if noted is None or noted == now:
            return
        held = [share for gradient in self._gradients() if (share := own_share(gradient)).numel()]
        if not held and self._look() is not None:
            return  # it has none of the numbers
        if held and host.waits(held[0]):
            self._any = (torch.stack(torch._foreach_norm(held)) != 0).any()
        else:
            self._any = any(bool(gradient.any()) for gradient in held)  # usually the first one's, and no more
        self._suspected, self._noted = True, None

    def are_gone(self, *, at_end: bool = False) -> bool:
        """Whether there was a gradient, and when that was suspected there was none, or nothing but zeros.

        Waits for the gradients' device, if they had been written to.

        Args:
            at_end: of the step; what is noted is of no use any more.
        """
        self._noted = None if at_end else self._noted
        suspected, self._suspected = self._suspected, False
        any_left, self._any = self._any, False
        return suspected and not bool(any_left)

    def _look(self) -> tuple[int, int] | None:
        first = next(iter(self._gradients()), None)
        return None if first is None else (id(first), first._version)

    def _gradients(self) -> Iterable[Tensor]:
        return (p.grad for p in self._parameters if p.grad is not None)
