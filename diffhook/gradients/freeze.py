"""Passes that compute no weight gradients."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn


@contextmanager
def frozen(parameters: Mapping[str, nn.Parameter], alive: Collection[str]) -> Iterator[None]:
    """While entered, autograd computes no gradients of ``parameters`` and ``.grad`` keeps its value.

    An error at any point, also on the way in, leaves every parameter as it was.

    Args:
        parameters: name → parameter, all with requires_grad.
        alive: names that must stay differentiable; what the pass adds to their ``.grad`` is dropped
            at once.
    """
    with ExitStack() as undo:
        for name, parameter in parameters.items():
            if name in alive:
                undo.callback(setattr, parameter, "grad", parameter.grad)
                undo.enter_context(_hooked(parameter))
                parameter.grad = None
            else:
                undo.callback(parameter.requires_grad_, True)
                parameter.requires_grad_(False)
        yield


@contextmanager
def _hooked(parameter: nn.Parameter) -> Iterator[None]:
    handle = parameter.register_post_accumulate_grad_hook(_drop)
    try:
        yield
    finally:
        handle.remove()


def _drop(parameter: Tensor) -> None:
    parameter.grad = None
