"""Passes that compute no weight gradients."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import TracebackType

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Frozen:
    """While entered, autograd computes no gradients of ``parameters`` and ``.grad`` keeps its value.

    Args:
        parameters: name → parameter, all with requires_grad.
        alive: names that must stay differentiable; what the pass adds to their ``.grad`` is let go
            of at once.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], alive: Collection[str]) -> None:
        self._parameters = parameters
        self._kept = {name: parameters[name].grad for name in alive}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> None:
        for name, parameter in self._parameters.items():
            if name in self._kept:
                parameter.grad = None
                self._handles.append(parameter.register_post_accumulate_grad_hook(_let_go))
            else:
                parameter.requires_grad_(False)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for name, parameter in self._parameters.items():
            parameter.requires_grad_(True)
            if name in self._kept:
                parameter.grad = self._kept[name]


def _let_go(parameter: Tensor) -> None:
    parameter.grad = None
