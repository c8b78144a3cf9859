"""The training loop as a capture sees it.

Every adapter translates a framework's happenings into these events, in this order, and does nothing else:

    for batch in loader:                         BatchReceived
        with accelerator.accumulate(model):
            output = model(noisy, timesteps)     ForwardBegan    a model with trained parameters is called
                                                 DenoiserCalled  one inside or after it knows the timesteps
                                                 OutputSeen      either of them has answered
            accelerator.backward(loss)           LossScaled      by what the loop's loss will be multiplied
                                                 BackwardBegan
                                                 BackwardEnded   the rows are staged
            optimizer.step()                     StepBegan
                                                 StepEnded       the rows are complete, and written
            optimizer.zero_grad()                GradientsZeroed without a step before: the rows moved nothing
        accelerator.save_state(folder)           SnapshotDue
                                                 LoaderEnded

A forward without a backward, a backward without a forward, several of either for one batch, a closure that
runs them inside the step: the session expects all of it, and a row is either right or absent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from diffhook.capture.loop.identity import RowIds, Unmatched


@dataclass(frozen=True)
class Event:
    """Something that happened in the loop."""


@dataclass(frozen=True)
class BatchReceived(Event):
    """The loop has a batch to train on.

    Attributes:
        ids: whose rows they are, or why that is not known; None: nobody knows anything of the batch.
        batch: the batch itself, whose images are looked at.
        timesteps: (B,) where the loop names them, in the scheduler's units.
        source: the pass over a loader that the batch comes from; None: the loop has named the batch itself.
    """

    ids: RowIds | Unmatched | None
    batch: Any = None
    timesteps: Tensor | None = None
    source: object | None = None


@dataclass(frozen=True)
class LoaderEnded(Event):
    """A pass over a loader is over; without a source, the loop has left the batch that it named."""

    source: object | None = None


@dataclass(frozen=True)
class ForwardBegan(Event):
    """A model that trained parameters are called through is about to run.

    Attributes:
        module: the model, or what calls the trained parts from outside.
        args, kwargs: its arguments, as far as they are known.
        training: whether gradients are enabled.
        presumed: it is not known yet whether it is one; a frozen autoencoder, say, is none.
    """

    module: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    training: bool = True
    presumed: bool = False


@dataclass(frozen=True)
class DenoiserCalled(Event):
    """A module within or after the model was told the timesteps: it makes the prediction."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class OutputSeen(Event):
    """A model has answered; None where it has failed."""

    module: nn.Module
    output: Any


@dataclass(frozen=True)
class LossScaled(Event):
    """The backward to come is of the loop's loss times ``scale · accumulation``.

    Attributes:
        scale: factor that the optimiser's step undoes (a GradScaler's).
        accumulation: factor that it does not, such as 1/k for k micro-batches a step.
    """

    scale: float = 1.0
    accumulation: float = 1.0


@dataclass(frozen=True)
class BackwardBegan(Event):
    """Autograd starts.

    Attributes:
        loss: the scalar as it is differentiated; None where it is no single one.
        factor: by which the mean over the rows of a loss for each is multiplied.
        only: the parameters whose gradients are asked for; None: all.
    """

    loss: Tensor | None = None
    factor: float = 1.0
    only: tuple[Tensor, ...] | None = None


@dataclass(frozen=True)
class BackwardEnded(Event):
    """Autograd has come back; ``failed`` with an exception of the loop's own."""

    failed: bool = False


@dataclass(frozen=True)
class StepBegan(Event):
    """An optimiser is about to move the parameters, perhaps by a ``closure`` that trains first."""

    optimizer: torch.optim.Optimizer
    closure: bool = False


@dataclass(frozen=True)
class StepEnded(Event):
    """An optimiser has moved the parameters, and the scheduler has not moved the rate yet.

    Attributes:
        optimizer: None where nobody saw one, and the parameters have changed.
        overflowed: it was stepped, and moved nothing.
    """

    optimizer: torch.optim.Optimizer | None = None
    overflowed: bool = False


@dataclass(frozen=True)
class GradientsZeroed(Event):
    """The gradients that had been accumulated are gone."""


@dataclass(frozen=True)
class SnapshotDue(Event):
    """The parameters are to be kept as they are now, and probed."""


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in a model's output: a tensor, a container or a dataclass of them."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in tensors_of(item)]
    if isinstance(value, tuple | list):
        return [tensor for item in value for tensor in tensors_of(item)]
    fields = list(getattr(value, "__dict__", {}).values())
    return tensors_of([item for item in fields if isinstance(item, Tensor | tuple | list)])
