"""The calls within a pass that were told timesteps, and those of them that its loss came from."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffhook.capture.loop.events import tensors_of
from diffhook.capture.loop.losses.row_losses import PredictionGradient
from diffhook.capture.loop.watches.call_inspection import find_timesteps
from diffhook.capture.objective.diffusion import predicted_tensor
from diffhook.compat.torch import in_backward
from diffhook.errors import ConfigurationError
from diffhook.gradients import Tape, on_gradient


@dataclass
class DenoiserCall:
    """One call that was told timesteps.

    Attributes:
        module: that was called.
        timesteps: (B,), in the model's units; a copy, since loops change theirs in place.
        by_name: by an argument that is called so; otherwise it is the second one, and a guess.
        arguments: what it was called with, where the pass is observed.
        prediction: reads the rows' losses off its output's gradient.
        answered: its output has been seen.
        reached: by the backward.
    """

    module: nn.Module
    timesteps: Tensor
    by_name: bool
    arguments: tuple[tuple[Any, ...], Mapping[str, Any]] | None = None
    prediction: PredictionGradient | None = None
    answered: bool = False
    reached: bool = False

    def seen(self, output: Any, tape: Tape, read_losses: bool) -> None:
        """The call has answered."""
        self.answered = True
        for tensor in tensors_of(output):
            if tensor.requires_grad:
                on_gradient(tensor, tape.guard, self._on_gradient)
        if read_losses:
            with suppress(ConfigurationError):  # an output of another kind: its losses stay unknown
                predicted = predicted_tensor(output)
                if predicted.dim() > 1 and predicted.requires_grad:
                    self.prediction = PredictionGradient(predicted, tape, keep=self.arguments is not None)

    def _on_gradient(self, _: Tensor) -> None:
        self.reached = True


class DenoiserCalls:
    """Those of one pass, in their order.

    Args:
        observed: keep what they were called with, and their outputs' gradients.
    """

    def __init__(self, *, observed: bool = False) -> None:
        self.observed = observed
        self._calls: list[DenoiserCall] = []

    def called(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A module is called that may be told timesteps.

        What it tells modules inside is another matter: a wrapper that is told sigma scales it for its
        network, an embedding of Flux is told a thousand times the timestep.

        Raises:
            CaptureError: it is told them in a shape that is none of the rows'.
        """
        if in_backward() or self.in_named_call:  # computed again, as checkpointing does
            return
        told = find_timesteps(module, args, kwargs)
        if told is not None:
            arguments = (args, kwargs) if self.observed else None
            self._calls.append(DenoiserCall(module, told.values.clone(), told.by_name, arguments))

    def answered(self, module: nn.Module, output: Any, tape: Tape, read_losses: bool) -> None:
        """A module has answered."""
        for call in reversed(self._calls):
            if call.module is module and not call.answered:
                call.seen(output, tape, read_losses or self.observed)
                return

    def find_errors(self, loss: Tensor) -> None:
        """See :meth:`PredictionGradient.find_errors`."""
        for call in self._calls:
            if call.prediction is not None:
                call.prediction.find_errors(loss)

    @property
    def in_named_call(self) -> bool:
        """Whether a module that was told them by name has not answered yet."""
        return any(call.by_name and not call.answered for call in self._calls)

    @property
    def know_timesteps(self) -> bool:
        """Whether a module was told them by name."""
        return any(call.by_name for call in self._calls)

    @property
    def know_prediction(self) -> bool:
        """Whether the prediction of such a module was seen."""
        return any(call.by_name and call.prediction is not None for call in self._calls)

    @property
    def prediction(self) -> PredictionGradient | None:
        """What reads the rows' losses off the loss's own prediction.

        Of several, such as a ControlNet's output and that of the frozen model behind it, the one whose error
        the loss squares; if none is seen to be, the first.
        """
        call = self.deciding
        return None if call is None else call.prediction

    @property
    def deciding(self) -> DenoiserCall | None:
        """The call whose :attr:`prediction` that is."""
        known = [call for call in self.of_loss() if call.prediction is not None]
        squared = (call for call in known if call.prediction is not None and call.prediction.found)
        return next(squared, known[0] if known else None)

    def of_loss(self) -> list[DenoiserCall]:
        """The calls that the backward has gone through; told by name, if any was."""
        reached = [call for call in self._calls if call.reached or not call.answered]
        return [call for call in reached if call.by_name] or reached


def timesteps_of(calls: list[DenoiserCall]) -> list[Tensor]:
    """The timesteps of calls, each once."""
    found: list[Tensor] = []
    for call in calls:
        if not any(torch.equal(call.timesteps, other) for other in found):
            found.append(call.timesteps)
    return found
