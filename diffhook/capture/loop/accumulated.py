"""Whether the gradients that a backward has left are still there when the loop goes on."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn


class AccumulatedGradients:
    """Notes the parameters' ``.grad`` after a backward, and says later whether all of it was thrown away.

    Loops do that in many ways of which nobody tells: ``model.zero_grad()``, ``p.grad = None``,
    ``torch._foreach_zero_``. Values are looked at only where something was written since.

    Args:
        parameters: the trained ones.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._noted: tuple[int, int] | None = None  # id() and version of the first gradient there is

    def note(self) -> None:
        """A backward has ended."""
        self._noted = self._look()

    def are_gone(self) -> bool:
        """Whether there was a gradient, and now there is none, or nothing but zeros."""
        noted, now = self._noted, self._look()
        if noted is None or noted == now:
            return False
        return not any(bool(gradient.any()) for gradient in self._gradients())

    def _look(self) -> tuple[int, int] | None:
        first = next(iter(self._gradients()), None)
        return None if first is None else (id(first), first._version)

    def _gradients(self) -> Iterable[Tensor]:
        return (p.grad for p in self._parameters if p.grad is not None)
