"""TorchHook: capture in a loop that says itself what it does."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.amp import GradScaler

from diffhook.capture.loop import Capture
from diffhook.capture.settings import Settings
from diffhook.integrations.hook import Hook
from diffhook.log.store import Location


class TorchHook(Hook):
    """Watches a training loop in plain PyTorch and logs per-sample gradients.

    Example:
        >>> hook = TorchHook("runs/butterflies", model, optimizer)
        >>> for batch in loader:
        ...     with hook.step(sample_ids=batch["id"]):  # around forward and backward
        ...         loss(model, batch).backward()
        ...     optimizer.step()
        >>> hook.close()

    It leaves nothing on model and optimiser after :meth:`close`, a ``with`` block, when it is
    garbage, and when another hook comes to the same model: so a notebook's cell can be run again
    after an error, and the rows of the run that died are kept. A loop that was interrupted may go on.

    Args:
        path: the log: a folder, an fsspec URL, or a zarr Store.
        watched: the trained model, or several that one backward reaches, unwrapped, not DDP's; the optimiser,
            whose steps count, of several the first one's; the ``GradScaler`` by which the loop scales its
            losses, if it does. Rows have the learning rate of the optimiser's first group.
        rank, processes: this process's number, and how many share the batch.
        settings: see :class:`~diffhook.capture.settings.Settings`.
    """

    def __init__(
        self,
        path: Location,
        *watched: nn.Module | torch.optim.Optimizer | GradScaler,
        rank: int = 0,
        processes: int = 1,
        **settings: Any,
    ) -> None:
        super().__init__(Capture(path, Settings.of(settings), rank=rank, processes=processes))
        self.watch(*watched)

    def watch(self, *given: nn.Module | torch.optim.Optimizer | GradScaler) -> None:
        """Watch trained models' calls, an optimiser's steps, or a scaler's scale.

        Raises:
            ConfigurationError: the model's parameters are sharded over processes.
        """
        self.capture.watch(*given)
