"""Which rows a loop's loss is a mean of, and what each row's share of it is."""

from __future__ import annotations

from diffhook.capture.loop.identity import blocks
from diffhook.capture.loop.losses.row_losses import Reading
from diffhook.capture.loop.micro_batch import MicroBatch
from diffhook.gradients import PerSampleGradients
from diffhook.log.samples import ROLE_STRIDE

_SAME = 1e-3  # of weights: a mean over a part of the rows weighs them so many times as much


class LossReader:
    """Reads the rows' losses of every pass, until a loss is seen to be no weighted mean of errors.

    Args:
        reduction: how the loop's loss joins the rows of a batch, "mean" or "sum".
    """

    def __init__(self, reduction: str) -> None:
        self.active = True  #: once contradicted, never again: other losses agree by chance now and then
        self._reduction = reduction

    def read(self, found: MicroBatch, engine: PerSampleGradients) -> tuple[Reading, int]:
        """The losses as far as they are known, and over how many rows the loop takes a mean.

        Where that mean is over a part of the rows, the engine's ``loss_scale`` is set to it.

        Args:
            found: with ids for each row.
            engine: that has finished the pass.
        """
        rows, parts = len(found.ids), blocks(found.ids)
        loss = None if found.loss is None else float(found.loss.detach()) / engine.loss_scale
        mean_of = rows if self._reduction == "mean" else 1
        with_classes = parts > 1 and bool((found.ids >= ROLE_STRIDE).any())
        reading = Reading(None)
        if not with_classes:
            reading = self._try(found, mean_of / engine.loss_scale, loss, rows // mean_of)
        if parts > 1 and mean_of > 1 and self._may_be_halves(found, reading, parts):
            # Prior preservation adds the means of both halves; other loops may as well.
            scale = engine.loss_scale * parts
            halves = self._try(found, rows / scale, loss, parts)
            if with_classes or halves.losses is not None:
                reading, mean_of = halves, rows // parts
                engine.loss_scale = scale
        if reading.contradicted:
            self.active = False
        return reading, mean_of

    def _may_be_halves(self, found: MicroBatch, reading: Reading, parts: int) -> bool:
        """Whether nothing says that the mean is one over all rows."""
        if reading.losses is None or found.prediction is None:
            return True
        return abs(found.prediction.weight(reading.losses) / parts - 1) < _SAME

    def _try(self, found: MicroBatch, undo: float, loss: float | None, parts: int) -> Reading:
        if found.prediction is None or not self.active:
            return Reading(None)
        return found.prediction.read(undo, loss, parts)
