"""Passes that compute no weight gradients."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import TracebackType

from torch import nn


class Frozen:
    """While entered, autograd computes no gradients of ``parameters`` and ``.grad`` keeps its value.

    Args:
        parameters: name → parameter, all with requires_grad.
        alive: names that must stay differentiable; what the pass adds to their ``.grad`` is taken
            back.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], alive: Collection[str]) -> None:
        self._parameters = parameters
        self._kept = {name: parameters[name].grad for name in alive}

    def __enter__(self) -> None:
        for name, parameter in self._parameters.items():
            if name in self._kept:
                parameter.grad = None
            else:
                parameter.requires_grad_(False)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        for name, parameter in self._parameters.items():
            parameter.requires_grad_(True)
            if name in self._kept:
                parameter.grad = self._kept[name]
