"""Summed weight gradients from per-sample products, in place of computing them a second time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from diffhook.compat.torch import in_backward
from diffhook.gradients.guard import Guard
from diffhook.gradients.layers import Owned
from diffhook.gradients.local_hook import LocalHook
from diffhook.gradients.tape import Tape, hookable, refuse_double_backward

Sums = dict[str, Tensor]  # local parameter name → gradient of the whole batch


class _Call:
    """One call of a layer that leaves its weight gradients to us.

    Args:
        owned: the layer.
        guard: keeps errors of ours from the user's backward.

    Attributes:
        sums: of the per-sample products, once they are complete.
        received: the gradient of the output, once the backward has reached it; None where it was in vain.
    """

    def __init__(self, owned: Owned, guard: Guard) -> None:
        self.owned = owned
        self.guard = guard
        self.sums: Sums = {}
        self.received: list[Tensor | None] = []

    def gradients(self, inputs: Tensor) -> Sums:
        """Of the layer's parameters: the ordinary way where there are no sums, for training must go on.

        None where its output has no gradient.
        """
        given = next((each for each in reversed(self.received) if each is not None), None)
        return self.sums or ({} if given is None else self._computed(inputs, given))

    def _computed(self, inputs: Tensor, given: Tensor) -> Sums:
        module, names = self.owned.module, list(self.owned.parameters)
        with torch.enable_grad():
            output = module.forward(inputs)
            gradient = given.view(output.shape).to(output.dtype)
            found = torch.autograd.grad(output, [getattr(module, local) for local in names], gradient)
        return dict(zip(names, found, strict=True))


class _Deliver(torch.autograd.Function):
    """Stands before a layer whose parameters look frozen, and hands autograd their gradients.

    Its backward runs after the layer's, when all gradients are there. Being an ordinary node above the
    parameters, it serves whatever waits for their gradients (DDP, hooks, accumulation).
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, call: _Call, *_: Tensor) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(inputs.detach())
        return inputs.view_as(inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled():
            refuse_double_backward()  # sums are no function of the gradients: training would be wrong
        call, (inputs,) = ctx.call, ctx.saved_tensors
        found = call.guard(call.gradients, inputs) or call.gradients(inputs)
        return grads[0], None, *map(found.get, call.owned.parameters)


class _BeforeCall(LocalHook):
    """A recomputation must save what the forward has saved, whatever fails in us."""

    def __init__(self, module: nn.Module, function: Callable[..., Any], tape: Tape, name: str) -> None:
        super().__init__(module, function, tape.guard.keep)
        self._tape, self._name = tape, name

    def failed(self, error: Exception, *call: Any) -> Any:
        super().failed(error)
        if in_backward():
            return self._function(*call)
        self._tape.failed.add(self._name)
        return None


class _AfterCall(LocalHook):
    """Parameters get back what they are, whatever fails in us."""

    def failed(self, error: Exception, *call: Any) -> None:
        self._function(*call)
        super().failed(error)


class Reuse:
    """Hooks on layers; while attached, chosen layers leave their weight gradients to us.

    Args:
        layers: name → layer.
        tape: has its hooks on them, too.
    """

    def __init__(self, layers: Mapping[str, Owned], tape: Tape) -> None:
        self.chosen: Collection[str] = ()  #: layers whose products are formed anyway
        self._layers = layers
        self._tape = tape
        tape.companions.append(self)  # before the tape: a call's sums are asked for before it ends here
        self._open: dict[str, _Call] = {}  # under way
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        self.detach()
        for name in self.chosen:
            module = self._layers[name].module
            before = _BeforeCall(module, partial(self._before, name), self._tape, name)
            after = _AfterCall(module, partial(self._after, name), self._tape.guard.keep)
            self._handles += [
                module.register_forward_pre_hook(before, with_kwargs=True),
                module.register_forward_hook(after, always_call=True, prepend=True),
            ]

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for name in list(self._open):  # a call that has not come to its end
            self._close(name)

    def _before(
        self, name: str, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        tape = self._tape
        if not self._handles or name in tape.failed:
            return None
        if tape.muted and not (in_backward() and name in tape.calls):
            return None
        if len(args) != 1 or kwargs or not torch.is_grad_enabled():  # it would be computed anew without them
            return None
        if not args[0].is_floating_point():  # nothing to stand before in the graph
            return None
        call = _Call(self._layers[name], tape.guard)
        parameters = [getattr(module, local) for local in call.owned.parameters]
        inputs = _Deliver.apply(args[0], call, *parameters)
        self._open[name] = call
        for parameter in parameters:
            parameter.requires_grad_(False)
        return (inputs,), {}

    def _after(self, name: str, module: Any, args: Any, output: Any) -> None:
        call = self._open.get(name)
        if call is not None and isinstance(output, Tensor) and output.requires_grad:  # else it has failed
            hookable(output).register_hook(call.received.append)  # in which nothing of ours can fail
        self._close(name)

    def _close(self, name: str) -> None:
        call = self._open.get(name)
        if call is not None:
            for local in call.owned.parameters:
                getattr(call.owned.module, local).requires_grad_(True)
            del self._open[name]

    def sums(self, name: str) -> Sums | None:
        """What the call under way is to have filled by its backward; None if autograd does it."""
        return self._open[name].sums if name in self._open else None
