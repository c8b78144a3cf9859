"""Who is who in the first passes: which module calls the trained parts, and which one knows the timesteps.

Usually the trained model itself, which is watched anyway. But adapters may hang in a frozen model that nobody
prepares, or in several; a trained wrapper may draw the timesteps itself and call the denoiser inside; a text
encoder is trained through a frozen denoiser. Until that is found out all modules' calls are seen; from then
on those modules' alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from diffhook.capture.loop.events import (
    BackwardEnded,
    BatchReceived,
    DenoiserCalled,
    Event,
    ForwardBegan,
    OutputSeen,
    tensors_of,
)
from diffhook.capture.loop.watches.attachment import Attachment, Handle
from diffhook.capture.loop.watches.call_inspection import find_timesteps, takes_timesteps
from diffhook.compat.torch import every_modules_hook, in_backward, without_function_modes
from diffhook.gradients import Guarded, LocalHook

Emit = Callable[[Event], None]


def _unseen(method: Callable[..., None]) -> Callable[..., None]:
    """What we compute here is no operation of the model's: passes would differ in how many they have."""

    @wraps(method)
    def unseen(*args: Any) -> None:
        with without_function_modes():
            method(*args)

    return unseen


class Models(Protocol):
    """The trained models that are watched."""

    def __len__(self) -> int: ...

    def contains(self, module: nn.Module) -> bool:
        """Whether the module is one, or has one inside."""
        ...


class PassSeen(Protocol):
    """What is known of the pass under way."""

    @property
    def in_named_call(self) -> bool: ...

    @property
    def knows_timesteps(self) -> bool: ...

    @property
    def knows_prediction(self) -> bool: ...


class Seen(Protocol):
    """What a session knows of the loop."""

    @property
    def started(self) -> bool: ...

    @property
    def expects_capture(self) -> bool: ...

    @property
    def under_way(self) -> PassSeen | None: ...

    @property
    def uses(self) -> int: ...


class CallWatch:
    """Finds the hosts of the trained parts and the denoiser, and watches their calls.

    Args:
        attachment: holds our hooks.
        emit: called with events.
        models: the trained models, which are watched anyway.
        session: knows what is still to be found.
    """

    def __init__(self, attachment: Attachment, emit: Emit, models: Models, session: Seen) -> None:
        self._attachment = attachment
        self._emit, self._models, self._session = emit, models, session
        self._hosts: list[nn.Module] = []
        self._denoiser: nn.Module | None = None
        self._candidate: nn.Module | None = None  # its timesteps may be told by keyword
        self._began: nn.Module | None = None  # what may be a host, and runs
        self._used = 0  # uses of trained parameters before it
        self._stack: list[nn.Module] = []
        self._looking: list[Callable[[], None]] = []
        self._settled = False  # a whole pass has been looked at: a frozen model may follow the trained one

    def follow(self, event: Event) -> None:
        """Look at all calls while it is not known who is who, as the session has taken ``event``."""
        seen, under_way = self._session, self._session.under_way
        if isinstance(event, BatchReceived):
            if len(self._models) and not seen.started and seen.expects_capture:
                self.look()
        elif isinstance(event, ForwardBegan):
            known = under_way is None or under_way.knows_timesteps
            if not known and not self._looking and self._denoiser is None:
                self.look()
        elif isinstance(event, OutputSeen | DenoiserCalled):
            if self._prediction_is_known() and (self._settled or self._denoiser is not None):
                self.stop()
        elif isinstance(event, BackwardEnded) and under_way is None:
            self._settled = True
            self.stop()

    def _prediction_is_known(self) -> bool:
        under_way = self._session.under_way
        return under_way is not None and under_way.knows_prediction

    def look(self) -> None:
        """See every call from now on, until :meth:`stop`."""
        self._stack.clear()
        self._candidate = None
        if not self._looking:
            self._looking = [
                self._attachment.hook(self._before_any, register_module_forward_pre_hook),
                self._attachment.hook(self._after_any, every_modules_hook),
            ]

    def stop(self) -> None:
        """See no more calls than those of the modules that were found."""
        looking, self._looking = self._looking, []
        for remove in looking:
            remove()
        self._stack.clear()
        self._candidate = None

    # ── all modules, while looking ────────────────────────────────────────────────────────────

    @_unseen
    def _before_any(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if in_backward():  # a checkpointed block is computed again
            return
        self._stack.append(module)
        if not torch.is_grad_enabled() or self._models.contains(module):
            return
        if len(self._stack) == 1 and self._may_be_host(module):
            self._began, self._used = module, self._session.uses
            self._emit(ForwardBegan(module, args, presumed=True))
        under_way = self._session.under_way
        known = self._denoiser is not None or (under_way is not None and under_way.in_named_call)
        if self._candidate is None and not known and takes_timesteps(module):
            self._candidate = module

    @_unseen
    def _after_any(self, module: nn.Module, args: Any, *kwargs_and_output: Any) -> None:
        if in_backward() or module not in self._stack:
            return
        # Of a call that fails, and of hooks that are taken off meanwhile, torch gives no keyword arguments.
        kwargs = kwargs_and_output[0] if len(kwargs_and_output) > 1 else {}
        output = kwargs_and_output[-1]
        while self._stack.pop() is not module:
            pass
        if module is self._candidate:
            self._candidate = None  # where it is not the one, another may be
            if self._predicts(output):
                self._judge(module, args, kwargs, output)
        if (
            not self._stack
            and torch.is_grad_enabled()
            and not self._models.contains(module)
            and (module is self._began or not (self._hosts or self._prediction_is_known()))
        ):
            self._judge_host(module, output)

    def _predicts(self, output: Any) -> bool:
        """Whether an output depends on trained parts: a frozen teacher's, or a copy's, does not."""
        return self._session.uses > 0 and any(tensor.requires_grad for tensor in tensors_of(output))

    def _may_be_host(self, module: nn.Module) -> bool:
        """The first that is called; once there is one, others that have parameters (a loss has none)."""
        if not self._hosts:
            return not self._session.uses
        known = any(module is host for host in self._hosts)
        return not known and next(module.parameters(), None) is not None

    def _judge(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        told = find_timesteps(module, args, kwargs)
        if told is not None and told.by_name:
            self._denoiser = module
            self._watch(module, self._before_denoiser, self._after_denoiser)
            self._emit(DenoiserCalled(module, args, kwargs))
            self._emit(OutputSeen(module, output))

    def _judge_host(self, module: nn.Module, output: Any) -> None:
        self._began = None
        if self._predicts(output) and (not self._hosts or self._session.uses > self._used):
            self._hosts.append(module)
            self._watch(module, self._before_host, self._after_host)
        self._emit(OutputSeen(module, output))

    # ── those that were found ─────────────────────────────────────────────────────────────────

    def _watch(self, module: nn.Module, before: Callable[..., None], after: Callable[..., None]) -> None:
        watch_calls(self._attachment, module, before, after)

    @_unseen
    def _before_host(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._emit(ForwardBegan(module, args, kwargs, torch.is_grad_enabled()))

    @_unseen
    def _after_host(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            self._emit(OutputSeen(module, output))

    @_unseen
    def _before_denoiser(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled() and not self._looking:
            self._emit(DenoiserCalled(module, args, kwargs))

    @_unseen
    def _after_denoiser(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.is_grad_enabled() and not self._looking:
            self._emit(OutputSeen(module, output))


def watch_calls(
    attachment: Attachment, module: nn.Module, before: Callable[..., None], after: Callable[..., None]
) -> list[Guarded]:
    """Have methods called with (module, args, kwargs) before and (module, args, output) after its calls.

    After one that fails, with None as its output. Copies of the module have no such hooks.

    Returns:
        What is called, first of all, before and after.
    """
    hooks: list[Guarded] = []

    def local(hook: Guarded) -> LocalHook:
        made = LocalHook(module, hook, hook.failed)
        hooks.append(made)
        return made

    def first(hook: Guarded) -> Handle:
        return module.register_forward_pre_hook(local(hook), with_kwargs=True)

    def then(hook: Guarded) -> Handle:
        return module.register_forward_hook(local(hook), always_call=True)

    attachment.hook(before, first)
    attachment.hook(after, then)
    return hooks
