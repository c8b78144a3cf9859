"""The factors of one forward's rows, multiplied into the gradients of what the denoiser predicts for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from diffhook.capture.loop.events import tensors_of
from diffhook.capture.loop.micro_batch import MicroBatch
from diffhook.capture.loop.watches.call_inspection import find_timesteps
from diffhook.compat.torch import hook_first
from diffhook.gradients import Guard

Find = Callable[[Tensor], Tensor | None]  # (B,) ids → (B,) factors; None: all are 1


@dataclass
class _Call:
    """A call that was told timesteps; ``outputs`` are where its tensors stand in the graph."""

    module: nn.Module
    by_name: bool
    answered: bool = False
    outputs: set[Node] = field(default_factory=set)


class ThrottledPass:
    """From a training forward to its backward.

    A row's loss reaches the parameters only through that row of the prediction: the gradient there times a
    factor is therefore that of the loss times the factor. Of calls within one another the outermost that is
    told timesteps by name counts.

    Args:
        batch: that the forward is called on, as far as it is known.
        find: gives the factors of samples.
        shield: through which runs what the backward calls.

    Attributes:
        factors: (B,) that the rows have, or would have if nothing spoke against it; None: all are 1.
        reached: the backward has come to a prediction.
        unfit: why it cannot be throttled; "" if it can.
    """

    def __init__(self, batch: MicroBatch, find: Find, shield: Guard) -> None:
        self._shield = shield
        self.reached = False
        self.unfit = ""
        self._find = find
        self._set(batch)
        self._calls: list[_Call] = []

    def _set(self, batch: MicroBatch) -> None:
        self._ids, self._shown = batch.ids, batch.shown
        self.factors = self._find(batch.ids)

    @property
    def over(self) -> bool:
        """Whether the next forward is another's: its backward has come, or would not be seen."""
        return self.reached or (self.factors is None and any(call.answered for call in self._calls))

    @property
    def applied(self) -> Tensor | None:
        """(B,) those that were multiplied into the gradients; None: all are 1."""
        return self.factors if self.reached and not self.why_not else None

    @property
    def why_not(self) -> str:
        """Why its factors are not, or will not be, applied; "" if they are."""
        if not self._shown:
            return "unknown-samples"
        return self.unfit or ("" if any(call.outputs for call in self._calls) else "no-prediction")

    def called(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], shown: object
    ) -> None:
        """A module is called.

        Args:
            shown: whose rows the arguments are shown to be, see :meth:`RowFinder.shown`.
        """
        if isinstance(shown, MicroBatch):
            if self._shown and not torch.equal(shown.ids, self._ids):
                self.unfit = "several-batches"
            self._set(shown)
        told = find_timesteps(module, args, kwargs)
        within = [call for call in self._calls if not call.answered]
        if told is None or any(call.by_name or not told.by_name for call in within):
            return
        earlier = set[Node]().union(*(call.outputs for call in self._calls))
        if earlier and _stands_behind(earlier, [*tensors_of(args), *tensors_of(dict(kwargs))]):
            self.unfit = "chained-calls"
        self._calls.append(_Call(module, told.by_name))

    def answered(self, module: nn.Module, output: Any) -> None:
        """A module has answered."""
        call = next((c for c in reversed(self._calls) if c.module is module and not c.answered), None)
        if call is None:
            return
        call.answered = True
        tensors = {id(tensor): tensor for tensor in tensors_of(output) if tensor.requires_grad}.values()
        if not self._counts(call) or self.factors is None:
            return
        if any(not tensor.dim() or len(self._ids) not in (1, len(tensor)) for tensor in tensors):
            self.unfit = "other-rows"
        for tensor in tensors:
            if tensor.grad_fn is not None:
                call.outputs.add(tensor.grad_fn)
                # First of all: it may be the last layer's own output, which the engine's hook sees, too.
                hook_first(tensor, partial(self._shield, self._scaled, call))

    def _counts(self, call: _Call) -> bool:
        return call.by_name or not any(other.by_name for other in self._calls)

    def _scaled(self, call: _Call, gradient: Tensor | None) -> Tensor | None:
        if gradient is None or not self._counts(call):
            return None
        self.reached = True
        factors = self.applied
        if factors is None:
            return None
        self.unfit = "failed"  # unless what follows goes well
        scaled = _times(gradient, factors)
        self.unfit = ""
        return scaled


def _times(gradient: Tensor, factors: Tensor) -> Tensor:
    """Row by row."""
    return gradient * factors.to(gradient).view(-1, *[1] * (gradient.dim() - 1))


def _stands_behind(nodes: set[Node], tensors: Iterable[Tensor]) -> bool:
    """Whether one of the tensors was computed from what the nodes of the graph have made."""
    waiting = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if node in nodes:
            return True
        new = {after for after, _ in node.next_functions if after is not None} - seen
        seen |= new
        waiting += new
    return False
