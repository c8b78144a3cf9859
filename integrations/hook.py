"""What every hook offers the loop that holds it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

from diffhook.capture import Quarantine
from diffhook.capture.loop import Capture
from diffhook.capture.loop.watches.attachment import shielded
from diffhook.errors import ConfigurationError


class Hook:
    """The public face of a capture. Adapters add how their framework attaches to it.

    Args:
        capture: that watches the loop.
    """

    def __init__(self, capture: Capture) -> None:
        self.capture = capture

    @shielded(nullcontext)
    def step(
        self, *, sample_ids: Any, timesteps: Any = None, loss_scale: float = 1.0, batch: Any = None
    ) -> AbstractContextManager[None]:
        """Name the samples of one micro-batch, around its forward and backward.

        Args:
            sample_ids: (B,) integers in [0, 2^51), or B strings: one for each row that the model is called
                on. Rows of one sample, such as the frames of a video, have its id, each of them.
            timesteps: (B,) numbers in the scheduler's units, or one for all rows; None to read them from the
                model's arguments, divided by the objective's ``timestep_scale`` where there is one.
            loss_scale: factor on the loss besides the mean over the batch and a scaler's, such as 1/k when
                the loop accumulates k micro-batches.
            batch: what the loop trains on, whose mean, contrast and roughness go into the log; see
                :func:`~diffhook.capture.samples.inputs.default_inputs`. Its rows are in the order of the ids:
                where the model is seen to be called in another one, the micro-batch is left out. A loop that
                trains it in parts, one backward each, may enter ``step`` once, around all of them.

        Raises:
            ConfigurationError: before the first captured step, something else given as ids.
        """
        return self.capture.step(
            sample_ids=sample_ids, timesteps=timesteps, loss_scale=loss_scale, batch=batch
        )

    @shielded()
    def flush(self) -> None:
        """See the rows of all finished steps to the disk, so that a reader finds them."""
        self.capture.flush()

    @shielded(again=True)
    def close(self) -> None:
        """Write what is left and leave everything as it was before us.

        Idempotent; also called at the end of training, on leaving a ``with`` block and at interpreter exit.
        """
        self.capture.close()

    @shielded(dict)
    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint that is being written; takes a snapshot, and sees all rows to disk.

        Those of every process, even if the first one alone calls this.
        """
        return self.capture.state()

    @shielded()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Training goes on from a checkpoint. Rows of later steps are superseded.

        Args:
            state: what :meth:`state_dict` gave; empty for a checkpoint written without us, whose steps are
                read off the optimiser.
        """
        self.capture.resume(state)

    @property
    def step_count(self) -> int:
        """Optimiser steps taken."""
        return self.capture.session.steps.count

    @property
    def closed(self) -> bool:
        """Whether nothing is captured any more."""
        return self.capture.closed

    @property
    def quarantine(self) -> Quarantine:
        """The samples that are left out, to add to and remove from by hand.

        Raises:
            ConfigurationError: quarantine is off.
        """
        found = self.capture.alerts.quarantine
        if not isinstance(found, Quarantine):
            raise ConfigurationError(
                "quarantine is off: pass alerts=Alerts(quarantine=True), or quarantine=Quarantine(kinds=()) "
                "to use it by hand only"
            )
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
