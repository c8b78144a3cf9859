"""One micro-batch on its way from the loader to the log."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

from torch import Tensor

from diffhook.capture.loop.losses.row_losses import PredictionGradient


@dataclass(frozen=True)
class MicroBatch:
    """What is known of the rows that one forward and backward will make; later events know more.

    Attributes:
        ids: (B,) int64, one for each row.
        images: (B, …) the clean samples, where the batch shows them.
        shown: the rows are known to be those; otherwise the batch that came last is presumed.
        timesteps: (B,), in the scheduler's units; until the backward, those that the loop has named itself.
        factors: (B,) by which the rows' gradients were multiplied, besides; None: all are 1.
        prediction: reads each row's loss off the prediction's gradient.
        scale: factor on the loss that the optimiser's step undoes.
        accumulation: factor on the loss that it does not.
        factor: by what else the loop has multiplied its loss.
        loss: the scalar that is differentiated.
    """

    ids: Tensor
    images: Tensor | None = None
    shown: bool = True
    timesteps: Tensor | None = None
    factors: Tensor | None = None
    prediction: PredictionGradient | None = None
    scale: float = 1.0
    accumulation: float = 1.0
    factor: float = 1.0
    loss: Tensor | None = None

    @property
    def loss_scale(self) -> float:
        """Everything by which the loop's own loss is multiplied before the backward."""
        return self.scale * self.accumulation * self.factor

    def knowing(self, **found: Any) -> Self:
        """The same micro-batch, knowing more."""
        return replace(self, **found)
