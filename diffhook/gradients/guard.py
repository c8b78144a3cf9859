"""Errors of ours inside someone else's calls."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import checkpoint
from torch.utils.hooks import RemovableHandle


class Guarded(ABC):
    """Something of ours that others call: torch, Accelerate, a DataLoader, the loop.

    Its work is done by :meth:`run`. An error there goes to :meth:`failed`, and the caller gets what that
    returns: by default None, which torch takes for "unchanged".

    Attributes:
        compiled: it was called within compiled code, where it does nothing: the graph is the loop's own.
    """

    compiled = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            self.compiled = True
            return None
        try:
            return self.run(*args, **kwargs)
        except Exception as error:
            if type(error).__module__ == checkpoint.__name__ and not isinstance(error, RuntimeError):
                raise  # so a checkpointed block ends its recomputation early
            return self.failed(error, *args, **kwargs)

    @abstractmethod
    def run(self, *args: Any, **kwargs: Any) -> Any:
        """What is called."""

    @abstractmethod
    def failed(self, error: Exception, *args: Any, **kwargs: Any) -> Any:
        """:meth:`run` has raised ``error``, called with these arguments."""


class Guard(Guarded):
    """Calls functions of ours: ``partial(guard, function, …)`` is a hook whose errors reach nobody else."""

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    def failed(self, error: Exception, *_: Any, **__: Any) -> None:
        self.keep(error)

    @abstractmethod
    def keep(self, error: Exception) -> None:
        """Take note of an error."""


def on_gradient(tensor: Tensor, guard: Guard, function: Callable[[Tensor], Any]) -> RemovableHandle:
    """Have ``function`` called with the gradient that a backward brings to ``tensor``, if it brings one.

    Torch calls hooks with None where it has been there in vain: at a result of ``chunk`` that the loss leaves
    aside, as models that also predict variances have them, or behind an operation that gives no gradient.

    Args:
        guard: keeps what fails.
    """
    return tensor.register_hook(partial(guard, _given, function))


def _given(function: Callable[[Tensor], Any], gradient: Tensor | None) -> Any:
    return None if gradient is None else function(gradient)


class PassGuard(Guard):
    """Keeps the first error of a pass for its end; training goes on.

    Attributes:
        error: the first error of the pass, or None.
    """

    def __init__(self) -> None:
        self.error: Exception | None = None

    def keep(self, error: Exception) -> None:
        self.error = self.error or error
