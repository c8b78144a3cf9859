"""Law one, completeness: the samples' gradients add up to what autograd itself delivers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge

from diffhook.compat.torch import gradient_hooks
from diffhook.gradients import host
from diffhook.gradients.guard import Guard, on_gradient
from diffhook.gradients.tape import Tape

# Relative to the samples' gradients, √Σ‖g_b‖²: above rounding, below what a wrong rule does. Measured on
# text-to-image UNets: at most 0.25% in bfloat16 and 0.05% in float16, but for layer norms, see `rounded`.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.01, torch.bfloat16: 0.01}
_ACCELERATOR_TOLERANCE = 1e-2  # of float32 where matrix products may run in TF32

# Bytes of residuals that are decided together: a processor need not wait for the answer.
_UNDECIDED = {"cpu": 4 << 20}
_UNDECIDED_ELSEWHERE = 64 << 20
_NOTHING = 1e-4  # share of all gradients below which a gradient may be nothing but rounding

CHANGED_BY_HOOK = "a hook on the parameter changes the gradient that training uses"
NEVER_SPLIT = "its uses never met a tensor whose first axis is the batch"
NOT_DELIVERED = "autograd gave it no gradient"


@dataclass
class _Balance:
    """What autograd delivered for one parameter, less what samples were found to contribute."""

    residual: Tensor | None = None
    squares: Tensor | None = None  # Σ‖g_b‖²
    delivered: Tensor | None = None  # norm of what autograd gave
    hooked: bool = False  # by others, before us
    rounded: bool = False  # autograd's own sum may be

    def settle(self, part: Tensor) -> None:
        self.residual = part if self.residual is None else self.residual + part

    def scale(self) -> Tensor:
        """What a residual is compared with: the larger of both sides."""
        sides = [self.squares.sqrt()] if self.squares is not None else []
        sides += [self.delivered] if self.delivered is not None else []
        return sides[0] if len(sides) == 1 else torch.maximum(*sides)


class CoverageCheck:
    """Compares, for every parameter, autograd's gradient with the sum of the samples'.

    Autograd's gradient is read just before it is accumulated, and before data-parallel training averages it:
    each process checks its own samples. What a custom function's backward asks autograd for, to hand it on,
    is no gradient yet.

    Cost: per-sample products of all layers are formed, one copy of the gradients that do not agree is
    kept, and an accelerator is waited for once for every 64 MiB of gradients.

    Args:
        parameters: name → parameter, all with requires_grad.
        tape: paused while the fallback differentiates on its own account.
        precision: the lowest dtype among the gradients of the pass so far.
        guard: keeps errors of ours from the user's backward.
        rounded: names of parameters whose gradients torch itself sums in half precision on a CPU, where the
            sums say nothing (layer norms are off by up to 360% at 16,384 tokens): not compared there.

    Attributes:
        hooks: on the parameters; closing this takes them off.
        conclusive: False if gradients were not finite: nothing can be said then.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        tape: Tape,
        precision: Callable[[], torch.dtype],
        guard: Guard,
        rounded: Collection[str],
    ) -> None:
        self.conclusive = True
        self._tape = tape
        self._precision = precision
        self._guard = guard
        self._balances = {
            name: _Balance(hooked=_is_hooked(p), rounded=name in rounded) for name, p in parameters.items()
        }
        self.hooks = ExitStack()  # closed without a call of ours, which could fail
        self._attached = False
        self._followed: dict[int, Tensor] = {}  # held, so that no id is reused
        self._parameters = parameters
        self._nodes: list[Node] = []
        self._undecided: dict[str, _Balance] = {}

    def attach(self) -> None:
        self._attached = True
        self.hooks.callback(setattr, self, "_attached", False)
        self.hooks.callback(self._followed.clear)
        self.hooks.callback(self._nodes.clear)
        for name, parameter in self._parameters.items():
            self._hook(name, parameter)

    def follow(self, name: str, tensor: Tensor) -> None:
        """``tensor`` stands for a parameter that is sharded otherwise: its gradient is that of this process's
        own samples, before the processes' are added up."""
        if self._attached and id(tensor) not in self._followed:
            self._followed[id(tensor)] = tensor
            balance = self._balances[name]
            balance.hooked = balance.hooked or _is_hooked(tensor)
            self._hook(name, tensor)

    def _hook(self, name: str, tensor: Tensor) -> None:
        if not tensor.is_leaf:
            self.hooks.callback(on_gradient(tensor, self._guard, partial(self._collect, name)).remove)
            return
        node = get_gradient_edge(tensor).node
        self._nodes.append(node)  # else nobody may hold it until the forward
        hook = partial(self._guard, self._on_accumulated, name)
        self.hooks.callback(node.register_prehook(hook).remove)

    def _on_accumulated(self, name: str, gradients: tuple[Tensor | None, ...]) -> None:
        for gradient in gradients:
            if gradient is not None:
                self._collect(name, gradient)

    def _collect(self, name: str, gradient: Tensor) -> None:
        if not self._tape.paused:
            self._deliver(name, gradient.detach())

    def _deliver(self, name: str, gradient: Tensor) -> None:
        balance = self._balances[name]
        gradient = _wide(gradient.to_dense() if gradient.is_sparse else gradient)
        norm = gradient.norm()
        balance.delivered = norm if balance.delivered is None else torch.hypot(balance.delivered, norm)
        balance.settle(gradient.clone())
        if balance.squares is not None:  # most balance at once and need not be kept
            self._undecided[name] = balance
            held = sum(b.residual.nbytes for b in self._undecided.values() if b.residual is not None)
            if held > _UNDECIDED.get(gradient.device.type, _UNDECIDED_ELSEWHERE):
                self._decide()

    def _decide(self) -> None:
        """Let go of the residuals that are nothing but rounding: one wait for the device, for all of them."""
        balances = [b for b in self._undecided.values() if b.residual is not None]
        self._undecided.clear()
        for balance, wrong in zip(balances, _flags([self._exceeds(b) for b in balances]), strict=True):
            if not wrong:
                balance.residual = None

    def add(self, name: str, summed: Tensor, squares: Tensor) -> None:
        """A layer rule has found gradients of ``name`` with this sum and Σ‖g_b‖²."""
        balance = self._balances[name]
        balance.squares = squares if balance.squares is None else balance.squares + squares
        balance.settle(-_wide(summed))

    def failures(self, pending: Mapping[str, Tensor]) -> dict[str, str]:
        """name → reason, for parameters whose gradient the pass has missed, wholly or in part.

        Args:
            pending: name → (B, *shape) gradients that were not reported to :meth:`add`.
        """
        for name, rows in pending.items():
            self.add(name, rows.sum(0), _wide(rows).flatten().square().sum())
        delivered = [b.delivered for b in self._balances.values() if b.delivered is not None]
        if not delivered:
            return {}
        self._decide()
        whole = torch.stack([norm.to(delivered[0].device) for norm in delivered]).norm()
        left = {name: b for name, b in self._balances.items() if b.residual is not None}
        wrong = [self._exceeds(balance, _NOTHING * whole) for balance in left.values()]
        infinite, *flags = _flags([~whole.isfinite(), *wrong])
        self.conclusive = not infinite
        return (
            {name: _reason(balance) for (name, balance), bad in zip(left.items(), flags, strict=True) if bad}
            if self.conclusive
            else {}
        )

    def _exceeds(self, balance: _Balance, floor: Tensor | None = None) -> Tensor:
        """Whether a parameter's residual is more than rounding, given gradients of at least ``floor``."""
        assert balance.residual is not None
        scale = balance.scale()
        if balance.squares is None:  # nothing was found: every gradient that counts is missed
            return scale > 0
        if floor is not None:
            scale = torch.maximum(scale, floor.to(scale))
        return balance.residual.norm() > self._tolerance(balance, scale) * scale

    def _tolerance(self, balance: _Balance, scale: Tensor) -> float:
        dtype = self._precision()
        if balance.rounded and dtype.itemsize < 4 and scale.device.type == "cpu":
            return float("inf")
        if dtype == torch.float32 and scale.device.type != "cpu":
            return _ACCELERATOR_TOLERANCE
        return _TOLERANCE.get(dtype, 0.01)


def _flags(values: list[Tensor]) -> list[bool]:
    """Flags of several devices, read at once."""
    return host.read(torch.stack([value.to(values[0].device) for value in values])) if values else []


def _reason(balance: _Balance) -> str:
    if balance.squares is None:
        return NEVER_SPLIT
    if balance.delivered is None:
        return NOT_DELIVERED
    if balance.hooked:
        return CHANGED_BY_HOOK
    assert balance.residual is not None
    (share,) = host.read((balance.residual.norm() / balance.scale()).reshape(1))
    return f"its samples' gradients miss autograd's sum by {share:.1%}"


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _is_hooked(parameter: Tensor) -> bool:
    return gradient_hooks(parameter) > 0
