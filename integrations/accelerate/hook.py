"""DiffHook: two lines in an Accelerate training loop."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

from accelerate import Accelerator
from torch import nn

from diffhook.capture import Alerts, Detector, Objective, Probe
from diffhook.capture.loop.watches.attachment import shielded
from diffhook.capture.settings import Settings
from diffhook.integrations.accelerate.accelerator_events import AcceleratorEvents, capture_on
from diffhook.integrations.hook import Hook
from diffhook.log.store import Location


class DiffHook(Hook):
    """Watches an Accelerate training loop and logs per-sample gradients.

    Example:
        >>> accelerator = Accelerator()
        >>> hook = DiffHook(accelerator, "runs/butterflies")  # before accelerator.prepare()

    The loop stays as it is. The hook learns of the models, optimiser and data from ``prepare``, of
    timesteps from the models' arguments, and sees every backward. Training results are bit-identical with
    and without it, unless the model is compiled: captured steps then run uncompiled. An error of ours costs
    the micro-batch at hand, is logged once, and never stops the training. It ends with
    ``accelerator.end_training()``, :meth:`close`, a ``with`` block or the interpreter; the accelerator keeps
    it, so a notebook's cell need not.

    After an error in the loop it waits, and the loop may go on. Run the cell again instead, and the
    new hook on the same accelerator or model sees the old one off; so does dropping the accelerator.
    What had been captured stays in the log.

    Args:
        accelerator: the loop's.
        path: the log: a folder, an fsspec URL, or a zarr Store.
        projection_dim, seed, every, overhead, snapshot_every, snapshot_dtype, keep_preconditioner, probe,
            objective, alerts, sample_ids, thumbnails, models, layers, reduction, reuse_products, workspace,
            strict, enabled: see :class:`~diffhook.capture.settings.Settings`.

    Raises:
        ConfigurationError: an option out of range, or parameters sharded in a way that is not supported.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        path: Location,
        *,
        projection_dim: int | Literal["full"] | None = None,
        seed: int = 0,
        every: int | None = None,
        overhead: float | None = None,
        snapshot_every: int | None = None,
        snapshot_dtype: Literal["float16", "bfloat16"] | None = None,
        keep_preconditioner: bool = False,
        probe: Probe | Literal[False] | None = None,
        objective: Objective | None = None,
        alerts: Alerts | Sequence[Detector] | None = None,
        sample_ids: str | Callable[..., Any] | Literal[False] | None = None,
        thumbnails: int = 0,
        models: Sequence[nn.Module] | None = None,
        layers: str | Sequence[str] | None = None,
        reduction: Literal["mean", "sum"] = "mean",
        reuse_products: bool = False,
        workspace: int | None = None,
        strict: bool = False,
        enabled: bool = True,
    ) -> None:
        settings = Settings(
            projection_dim=projection_dim,
            seed=seed,
            every=every,
            overhead=overhead,
            snapshot_every=snapshot_every,
            snapshot_dtype=snapshot_dtype,
            keep_preconditioner=keep_preconditioner,
            probe=probe,
            objective=objective,
            alerts=alerts,
            sample_ids=sample_ids,
            thumbnails=thumbnails,
            models=models,
            layers=layers,
            reduction=reduction,
            reuse_products=reuse_products,
            workspace=workspace,
            strict=strict,
            enabled=enabled,
        )
        super().__init__(capture_on(accelerator, path, settings))
        self.accelerator = accelerator
        self._events = AcceleratorEvents(accelerator, self.capture, keeper=self)

    @shielded()
    def save(self, folder: str | os.PathLike[str]) -> None:
        """A checkpoint is being written to ``folder``; ``accelerator.save_state`` calls this."""
        self._events.save(folder)

    @shielded()
    def load(self, folder: str | os.PathLike[str]) -> None:
        """Training goes on from a checkpoint; ``accelerator.load_state`` calls this."""
        self._events.load(folder)
