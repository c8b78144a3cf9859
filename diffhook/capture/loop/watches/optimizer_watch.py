"""Sees the steps of every optimiser that moves trained parameters, prepared or not."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from diffhook.capture.loop.events import Event, GradientsZeroed, StepBegan, StepEnded
from diffhook.capture.loop.watches.attachment import Attachment
from diffhook.capture.loop.watches.optimizers import overflowed, scale_of, steps_taken
from diffhook.capture.recording.preconditioner import adam_preconditioner
from diffhook.compat.deepspeed import steps_itself


class OptimizerWatch:
    """Emits steps, each once: of optimisers that step in turn after a backward, the first one's.

    Args:
        attachment: holds our hooks.
        emit: called with events.
        moves: whether an optimiser moves parameters that count.
        saved: called where the state of one is read: the loop writes a checkpoint of its own.
    """

    def __init__(
        self,
        attachment: Attachment,
        emit: Callable[[Event], None],
        moves: Callable[[torch.optim.Optimizer], bool],
        saved: Callable[[], None],
    ) -> None:
        self._attachment = attachment
        self._emit, self._moves, self._saved = emit, moves, saved
        self._watched: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._turns: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()  # that have taken this step
        self._counted: weakref.ref[torch.optim.Optimizer] | None = None
        self._under_way: weakref.ref[torch.optim.Optimizer] | None = None  # the outermost, as SAM's
        self._itself: weakref.ref[torch.optim.Optimizer] | None = None  # DeepSpeed's: torch does not tell
        self._scaler: GradScaler | None = None
        attachment.hook(self._before_step, register_optimizer_step_pre_hook, again=True)
        attachment.hook(self._after_step, register_optimizer_step_post_hook, again=True)

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """Whose step counted last, once there is one."""
        return None if self._counted is None else self._counted()

    def preconditioner(self, parameters: Mapping[str, nn.Parameter]) -> Mapping[str, Tensor]:
        """See :func:`~diffhook.capture.recording.preconditioner.adam_preconditioner`."""
        return adam_preconditioner(self.optimizer, parameters)

    def add(self, given: torch.optim.Optimizer | GradScaler) -> None:
        """Watch an optimiser from before its first step, or ask a scaler for its scale."""
        if isinstance(given, GradScaler):
            self._scaler = given
        elif given not in self._watched:
            self._watched.add(given)
            self._attachment.replace(given, "zero_grad", after=self._after_zeroed)
            self._attachment.replace(given, "state_dict", before=self._before_state)
            if steps_itself(given):
                self._itself = weakref.ref(given)
                self._attachment.replace(given, "step", before=self._before_own, after=self._after_own)

    def scale(self) -> float:
        """By what the scaler multiplies losses, if there is one. Waits for its device."""
        return scale_of(self._scaler)

    def new_step(self) -> None:
        """Gradients are made anew: the next optimiser to step takes another step."""
        self._turns.clear()

    @property
    def known(self) -> list[torch.optim.Optimizer]:
        """All that are watched."""
        return list(self._watched)

    @property
    def sees_steps(self) -> bool:
        """Whether an optimiser of parameters that count is known."""
        return self.optimizer is not None or any(map(self._moves, self._watched))

    @property
    def steps_taken(self) -> int:
        """How many they have counted themselves; 0 where none does."""
        return max((steps_taken(optimizer) for optimizer in self.known if self._moves(optimizer)), default=0)

    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        nested = self._under_way is not None and self._under_way() not in (None, optimizer)
        if nested or not self._moves(optimizer):
            return
        self.add(optimizer)
        if self._turns and optimizer not in self._turns:  # another one's share of the same step
            self._turns.add(optimizer)
            return
        self._turns = weakref.WeakSet([optimizer])
        self._counted = self._under_way = weakref.ref(optimizer)
        self._emit(StepBegan(optimizer, closure=any(map(callable, (*args, *kwargs.values())))))

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self._under_way is None or self._under_way() is not optimizer:
            return
        self._emit(StepEnded(optimizer, overflowed(optimizer)))
        self._under_way = None

    def _before_own(self, *args: Any, **kwargs: Any) -> None:
        if self._itself is not None and (optimizer := self._itself()) is not None:
            self._before_step(optimizer, args, kwargs)

    def _after_own(self, *_: Any, **__: Any) -> None:
        if self._itself is not None and (optimizer := self._itself()) is not None:
            self._after_step(optimizer)

    def _before_state(self, *_: Any, **__: Any) -> None:
        self._saved()

    def _after_zeroed(self, *_: Any, **__: Any) -> None:
        self._emit(GradientsZeroed())
