"""The frozen denoiser through which another model is trained, as a text encoder by textual inversion.

Nobody prepares it, so nobody tells of it; but it is what is called with the timesteps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle

from diffhook.capture.loop.attachment import Weak
from diffhook.capture.loop.call_inspection import NAMES, parameters_of
from diffhook.gradients import LocalHook


class FrozenDenoiser:
    """Looks for the denoiser among all modules called, and once it is found watches its calls alone.

    Args:
        trained: what the trained models are made of, which are not looked at.
        on_forward: a method, called before its forward with (model, args, kwargs), from the next call on.
        on_output: one called after it with (model, args, output), from this call on.
        on_found: called when it is found, with (model, args); what it is told by keyword is not known yet.
    """

    def __init__(
        self,
        trained: Callable[[], nn.Module],
        on_forward: Callable[..., None],
        on_output: Callable[..., None],
        on_found: Callable[..., None],
    ) -> None:
        self._trained = trained
        self._on_forward, self._on_output, self._on_found = on_forward, on_output, on_found
        self._looking: Weak | None = None
        self._over = False  # it is found, or not needed
        self._parts: set[nn.Module] = set()
        self._undo: list[Callable[[], None]] = []

    def look(self) -> None:
        """Look at every call from now on, until it is found or :meth:`stop`."""
        if self._looking is None and not self._over:
            self._parts = set(self._trained().modules())
            self._looking = Weak(self._called, register_module_forward_pre_hook)

    def stop(self) -> None:
        """Look no more, ever: the calls of all modules are seen in a run's first pass at most."""
        self._over = True
        looking, self._looking = self._looking, None
        self._parts.clear()
        if looking is not None:
            looking.remove()

    def leave(self) -> None:
        """Take off whatever is there."""
        self.stop()
        while self._undo:
            self._undo.pop()()

    def _called(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        wanted = self._looking is not None and torch.is_grad_enabled() and module not in self._parts
        if not wanted or not any(name in NAMES for name in parameters_of(module)):
            return
        self.stop()

        def before(hook: Callable[..., Any]) -> RemovableHandle:
            return module.register_forward_pre_hook(LocalHook(module, hook), with_kwargs=True)

        def after(hook: Callable[..., Any]) -> RemovableHandle:
            return module.register_forward_hook(LocalHook(module, hook))

        self._undo = [Weak(self._on_forward, before).remove, Weak(self._on_output, after).remove]
        self._on_found(module, args)
