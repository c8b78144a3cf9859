"""Sees every call of a layer: its input in the forward, its output's gradient in the backward."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from diffhook.compat.torch import in_backward, view_base
from diffhook.errors import CaptureError
from diffhook.gradients.guard import Guard, PassGuard, on_gradient
from diffhook.gradients.local_hook import LocalHook

OnBackward = Callable[[Tensor | None, Tensor], None]  # input (None: let go of), output's gradient
OnForward = Callable[[str, Tensor, Tensor], OnBackward | None]


class Hooks(Protocol):
    """What can be put on layers and taken off."""

    def attach(self) -> None: ...

    def detach(self) -> None: ...


class _Keep(torch.autograd.Function):
    """A graph node whose only purpose is to keep a tensor.

    Saved this way, a layer's input obeys autograd's own rules: under gradient checkpointing it is
    dropped and recomputed, under CPU offloading it is moved, and it can never outlive the backward.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, kept: Tensor) -> Tensor:
        ctx.save_for_backward(kept)
        return anchor.new_empty(0)  # of no numbers: no kernel fills it

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise AssertionError("this node is never part of a backward pass")


class _Root(torch.autograd.Function):
    """Makes an output that needs no gradient one that does (a leaf could not be changed in place)."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, output: Tensor) -> Tensor:
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, None


class _Kept:
    """A layer's input, until it is released."""

    def __init__(self, anchor: Tensor, inputs: Tensor) -> None:
        # The output, not its node alone, which torch 2.6 frees with its last tensor.
        self._output: Any = _Keep.apply(anchor, inputs.detach())

    def tensor(self) -> Tensor | None:
        """The input; recomputed under checkpointing."""
        return None if self._output is None else self._output.grad_fn.saved_tensors[0]

    def let_go(self) -> None:
        self._output = None


def refuse_double_backward() -> None:
    """
    Raises:
        CaptureError: the backward under way will be differentiated itself.
    """
    if torch.is_grad_enabled():
        raise CaptureError(
            "a backward with create_graph=True ran through the model (a gradient penalty?): gradients of "
            "gradients are not split by sample, so this pass has no rows",
            kind="double backward",
        )


class _LayerHook(LocalHook):
    """The forward hook of one layer."""

    def __init__(self, layer: nn.Module, tape: Tape, name: str) -> None:
        super().__init__(layer, tape.watch_call, tape.guard.keep)
        self._tape = tape
        self._name = name
        self._kept: list[_Kept] = []  # by the call under way

    def run(self, module: nn.Module, *call: Any) -> Any:
        tape, name = self._tape, self._name
        if module is self._module and tape.armed and name not in tape.failed:
            return tape.watch_call(name, call, self._kept)
        return None

    def failed(self, error: Exception, module: nn.Module, *call: Any) -> None:
        tape, name = self._tape, self._name
        if not self._kept and module is self._module and tape.armed:
            if not in_backward():
                tape.failed.add(name)  # a recomputation may not save more than the forward has saved …
            elif name in tape.keeps and name not in tape.failed:
                _Kept(tape.anchor, _first(call))  # … nor less
        self._kept.clear()
        tape.guard.keep(error)


def _first(call: tuple[Any, ...]) -> Tensor:
    """The input of a layer: args, kwargs, output → the first argument."""
    args, kwargs, _ = call
    inputs: Tensor = args[0] if args else next(iter(kwargs.values()))
    return inputs


class Tape:
    """Forward hooks on layers; while attached, each call is reported with its output's gradient.

    Args:
        layers: name → layer.
        on_forward: called with (name, input, output) for each call; returns what to call with
            (input, grad_output) in the backward, or None to decline the call.
        inputless: layers whose input is not needed: it is not kept, since autograd may not keep it
            either and the loop may change it in place.

    Set ``require_outputs`` to give outputs that need no gradient one, so that layers whose
    parameters are frozen are reached by the backward all the same.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        on_forward: OnForward,
        inputless: Collection[str] = (),
    ) -> None:
        self.layers = layers
        self.armed = False  # attached, whether there is a layer or not
        self.muted = False
        self.companions: list[Hooks] = []  #: put on the layers before our own hooks
        self.paused = False  # while we run backward passes of our own
        self.blind = False  #: what is computed now is FSDP's, and no operation of the model
        self.require_outputs = False
        # Inputs are let go of as the backward passes their layer, as autograd does with its own.
        self.let_go = True
        self.calls: Counter[str] = Counter()
        self.seconds = 0.0  # spent in callbacks
        self.failed: set[str] = set()  # layers whose hook failed in this pass before it saved anything
        self.keeps: set[str] = set()  # layers whose inputs are saved in this pass
        self.guard: Guard = PassGuard()  #: of the pass
        self._on_forward = on_forward
        self._inputless = frozenset(inputless)
        self._handles: list[RemovableHandle] = []
        self.anchor = torch.zeros((), requires_grad=True)

    def attach(self, guard: Guard) -> None:
        """Report the next pass.

        Args:
            guard: gets errors of ours in hooks, which must not reach the user's loop.
        """
        self.detach()
        self.guard = guard
        self.paused = False
        self.calls.clear()
        self.failed.clear()
        self.keeps.clear()
        self.seconds = 0.0
        self.armed = True
        for companion in self.companions:
            companion.attach()
        for name, layer in self.layers.items():
            hook = _LayerHook(layer, self, name)
            # The first of all: others may change what the layer has made.
            self._handles.append(layer.register_forward_hook(hook, with_kwargs=True, prepend=True))

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """While we run a backward of our own; its time counts as ours."""
        began, before = time.perf_counter(), self.paused
        self.paused = True
        try:
            yield
        finally:
            self.paused = before
            self.seconds += 0.0 if before else time.perf_counter() - began

    def give_up(self) -> None:
        """Report no more of this pass. Its backward may come all the same, in which checkpointed blocks are
        computed again and must save what they saved before: for that, hooks stay until the next forward."""
        self.muted = self.armed and bool(self.calls)
        if not self.muted:
            self.detach()

    def detach(self) -> None:
        self.armed = self.muted = False
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for companion in self.companions:
            companion.detach()

    def watch_call(self, name: str, call: tuple[Any, ...], kept: list[_Kept]) -> Tensor | None:
        """A layer was called; ``kept`` holds its input from when that is saved until the call is watched."""
        again = in_backward()
        if self.muted and not again:
            if name in self.calls:
                self.detach()
            return None
        if self.muted and name not in self.calls:  # given up before: nothing was saved for a recomputation
            return None
        if not again:
            # Calls under no_grad count too: reentrant checkpointing runs its first forward so. To
            # count one too many costs time, one too few would lose the sum of a shared layer.
            self.calls[name] += 1
        inputs, output = _first(call), call[-1]
        on_backward = self._on_forward(name, inputs, output) if torch.is_grad_enabled() else None
        if on_backward is None:
            return None
        replacement = None
        if self.require_outputs and not output.requires_grad:
            output = replacement = _Root.apply(self.anchor, output)
        if output.requires_grad:
            if name not in self._inputless:
                kept.append(_Kept(self.anchor, inputs))
                self.keeps.add(name)
            saved = kept[0] if kept else None
            hook = partial(self._backward, on_backward, saved, output.shape)
            on_gradient(hookable(output), self.guard, hook)
            kept.clear()
        return replacement

    def _backward(
        self, on_backward: OnBackward, kept: _Kept | None, shape: torch.Size, grad_output: Tensor
    ) -> None:
        if self.paused:
            return
        refuse_double_backward()
        grad = grad_output.detach().view(shape)
        inputs = grad if kept is None else kept.tensor()
        began = time.perf_counter()
        on_backward(inputs, grad)
        self.seconds += time.perf_counter() - began
        if kept is not None and self.let_go:
            kept.let_go()


def hookable(output: Tensor) -> Tensor:
    """The tensor whose gradient hook survives an in-place change of ``output``.

    Linear returns a view where its input has three axes; changing a view in place takes the view's
    node, and with it the hook, out of the graph.
    """
    base = view_base(output)
    if base is not None and base.requires_grad and base.numel() == output.numel() and output.is_contiguous():
        return base
    return output
