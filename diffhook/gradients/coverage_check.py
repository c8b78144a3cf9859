"""Law one, completeness: the samples' gradients add up to what autograd itself delivers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from diffhook.gradients.guard import Guard
from diffhook.gradients.tape import Tape

# Relative to the samples' gradients, √Σ‖g_b‖²: above rounding, below what a wrong rule does. In half
# precision autograd's own sums over tokens round by several percent.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.1}
_ACCELERATOR_TOLERANCE = 1e-2  # of float32 where matrix products may run in TF32

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

    def settle(self, part: Tensor) -> None:
        self.residual = part if self.residual is None else self.residual + part


class CoverageCheck:
    """Compares, for every parameter, autograd's gradient with the sum of the samples'.

    Autograd's gradient is read by a tensor hook, before it is accumulated and before data-parallel
    training averages it: each process checks its own samples.

    Cost: per-sample products of all layers are formed, one copy of the gradients that do not agree is
    kept, and each parameter waits once for its device.

    Args:
        parameters: name → parameter, all with requires_grad.
        tape: paused while the fallback differentiates on its own account.
        precision: the lowest dtype among the gradients of the pass so far.
        guard: keeps errors of ours from the user's backward.

    Attributes:
        conclusive: False if gradients were not finite: nothing can be said then.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        tape: Tape,
        precision: Callable[[], torch.dtype],
        guard: Guard,
    ) -> None:
        self.conclusive = True
        self._tape = tape
        self._precision = precision
        self._guard = guard
        self._balances = {name: _Balance(hooked=_is_hooked(p)) for name, p in parameters.items()}
        self._handles: list[RemovableHandle] = []
        self._parameters = parameters

    def attach(self) -> None:
        for name, parameter in self._parameters.items():
            self._handles.append(parameter.register_hook(partial(self._guard, self._collect, name)))

    def close(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _collect(self, name: str, gradient: Tensor) -> None:
        if not self._tape.paused:
            self._deliver(name, gradient.detach())

    def _deliver(self, name: str, gradient: Tensor) -> None:
        balance = self._balances[name]
        gradient = _wide(gradient.to_dense() if gradient.is_sparse else gradient)
        norm = gradient.norm()
        balance.delivered = norm if balance.delivered is None else torch.hypot(balance.delivered, norm)
        balance.settle(gradient.clone())
        # Most balance at once and need not be kept.
        scale = None if balance.squares is None else torch.maximum(balance.squares.sqrt(), norm)
        if scale is not None and self._agrees(balance, scale):
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
        whole = torch.stack([norm.to(delivered[0].device) for norm in delivered]).norm()
        self.conclusive = bool(whole.isfinite())
        if not self.conclusive:
            return {}
        reasons = {name: self._reason(balance, whole) for name, balance in self._balances.items()}
        return {name: reason for name, reason in reasons.items() if reason is not None}

    def _reason(self, balance: _Balance, whole: Tensor) -> str | None:
        if balance.residual is None:
            return None
        floor = _NOTHING * whole.to(balance.residual.device)
        own = balance.residual.new_zeros(()) if balance.squares is None else balance.squares.sqrt()
        scale = own if balance.delivered is None else torch.maximum(own, balance.delivered)
        if balance.squares is None:  # nothing was found: every gradient that counts is missed
            return NEVER_SPLIT if bool(scale > 0) else None
        if self._agrees(balance, torch.maximum(scale, floor)):
            return None
        if balance.delivered is None:
            return NOT_DELIVERED
        if balance.hooked:
            return CHANGED_BY_HOOK
        return f"its samples' gradients miss autograd's sum by {float(balance.residual.norm() / scale):.1%}"

    def _agrees(self, balance: _Balance, scale: Tensor) -> bool:
        assert balance.residual is not None
        dtype = self._precision()
        tolerance = _TOLERANCE.get(dtype, 0.1)
        if dtype == torch.float32 and scale.device.type != "cpu":
            tolerance = _ACCELERATOR_TOLERANCE
        return not bool(balance.residual.norm() > tolerance * scale)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _is_hooked(parameter: Tensor) -> bool:
    return bool(parameter._backward_hooks)
