"""TorchHook: capture in a loop that says itself what it does."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.amp import GradScaler
from torch.utils.data import DataLoader

from diffhook.capture.loop import Capture, events
from diffhook.capture.loop.identity.batch_ids import shown_by
from diffhook.capture.loop.identity.origin import Origin
from diffhook.capture.settings import Settings
from diffhook.integrations.hook import Hook
from diffhook.integrations.torch import fetches
from diffhook.log.store import Location

Watched = nn.Module | torch.optim.Optimizer | GradScaler | DataLoader[Any]


class TorchHook(Hook):
    """Watches a training loop in plain PyTorch and logs per-sample gradients.

    Example:
        >>> hook = TorchHook("runs/butterflies", model, optimizer)
        >>> for batch in loader:
        ...     with hook.step(sample_ids=batch["id"]):  # around forward and backward
        ...         loss(model, batch).backward()
        ...     optimizer.step()
        >>> hook.close()

    Given the loop's DataLoader as well, it takes the ids out of the batches, and the loop names nothing:

        >>> hook = TorchHook("runs/butterflies", model, optimizer, loader)

    It leaves nothing on model and optimiser after :meth:`close`, a ``with`` block, when it is
    garbage, and when another hook comes to the same model: so a notebook's cell can be run again
    after an error, and the rows of the run that died are kept. A loop that was interrupted may go on.

    Args:
        path: the log: a folder, an fsspec URL, or a zarr Store.
        watched: the trained model, or several that one backward reaches, unwrapped, not DDP's, but as
            FSDP shards it; the optimiser, whose steps count, of several the first one's; the ``GradScaler``
            by which the loop scales its losses, if it does; the DataLoader, if its batches hold ids or names
            (``batch["image_path"]``). Rows have the learning rate of the optimiser's first group.
        rank, processes: this process's number, and how many share the batch.
        settings: see :class:`~diffhook.capture.settings.Settings`.
    """

    def __init__(
        self,
        path: Location,
        *watched: Watched,
        rank: int = 0,
        processes: int = 1,
        **settings: Any,
    ) -> None:
        super().__init__(Capture(path, Settings.of(settings), rank=rank, processes=processes))
        self._datasets: list[Any] = []  # of the loaders that are watched
        self.watch(*watched)

    def watch(self, *given: Watched) -> None:
        """Watch trained models' calls, an optimiser's steps, a scaler's scale, or a loader's batches.

        Raises:
            ConfigurationError: the model's parameters are sharded in a way that is not supported.
        """
        for one in () if self.closed else given:
            if isinstance(one, DataLoader):
                self._watch_loader(one)
            else:
                self.capture.watch(one)

    def _watch_loader(self, loader: DataLoader[Any]) -> None:
        if not self._datasets:
            self.capture.attachment.hook(self._on_fetched, fetches.listen)
        self._datasets.append(loader.dataset)

    def _on_fetched(self, batch: Any, dataset: Any, here: bool) -> None:
        if not any(dataset is known for known in self._datasets):
            return
        capture = self.capture
        if not here:
            capture.session.fetched_elsewhere()
            return
        if batch is None:
            capture.on(events.LoaderEnded(dataset))
            return
        origin = Origin(dataset, kind="no-ids", source=dataset)
        found = capture.identity.of(batch, origin, waits=capture.session.staging.needs_rows)
        capture.on(events.BatchReceived(found, shown_by(batch), source=dataset))
        capture.on(events.LossScaled(capture.scale()))
