"""Summed weight gradients from per-sample products, in place of computing them a second time."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from diffhook.gradients.layers import Owned
from diffhook.gradients.local_hook import LocalHook
from diffhook.gradients.tape import Tape, in_backward, refuse_double_backward

Sums = dict[str, Tensor]  # local parameter name → gradient of the whole batch


class _Deliver(torch.autograd.Function):
    """Stands before a layer whose parameters look frozen, and hands autograd their gradients.

    Its backward runs after the layer's, so by then ``sums`` has been filled. Being an ordinary node
    above the parameters, it serves whatever waits for their gradients (DDP, hooks, accumulation).
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, sums: Sums, names: list[str], *_: Tensor) -> Tensor:
        ctx.sums, ctx.names = sums, names
        return inputs.view_as(inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        refuse_double_backward()  # sums are no function of the gradients: training would be wrong
        return grads[0], None, None, *(ctx.sums.pop(name) for name in ctx.names)


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
        self._open: dict[str, Sums] = {}  # of the calls under way
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        self.detach()
        for name in self.chosen:
            module = self._layers[name].module
            before = LocalHook(module, partial(self._before, name), self._tape.on_failure)
            after = LocalHook(module, partial(self._after, name), self._tape.on_failure)
            self._handles += [
                module.register_forward_pre_hook(before),
                module.register_forward_hook(after, always_call=True, prepend=True),
            ]

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for name in list(self._open):  # a call that has not come to its end
            self._close(name)

    def _before(self, name: str, module: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not self._handles or (self._tape.muted and not in_backward()):
            return None
        if len(args) != 1 or not torch.is_grad_enabled():
            return None
        if not args[0].is_floating_point():  # nothing to stand before in the graph
            return None
        names = list(self._layers[name].parameters)
        parameters = [getattr(module, local) for local in names]
        sums = self._open[name] = {}
        inputs = _Deliver.apply(args[0], sums, names, *parameters)
        for parameter in parameters:
            parameter.requires_grad_(False)
        return (inputs,)

    def _after(self, name: str, module: Any, args: Any, output: Any) -> None:
        self._close(name)

    def _close(self, name: str) -> None:
        if self._open.pop(name, None) is not None:
            owned = self._layers[name]
            for local in owned.parameters:
                getattr(owned.module, local).requires_grad_(True)

    def sums(self, name: str) -> Sums | None:
        """What the call under way must have filled by its backward; None if autograd does it."""
        return self._open.get(name)

    def fill(self, name: str, sums: Sums, inputs: Tensor, grad_output: Tensor) -> None:
        """The ordinary way, where the products have failed: training must not."""
        owned = self._layers[name]
        values = [getattr(owned.module, local) for local in owned.parameters]
        with torch.enable_grad():
            output = owned.module.forward(inputs.detach())
            found = torch.autograd.grad(output, values, grad_output.to(output.dtype))
        sums.update(zip(owned.parameters, found, strict=True))
