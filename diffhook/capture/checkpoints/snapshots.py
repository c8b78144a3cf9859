"""A snapshot's parameters back on the model, whether the log holds them or a checkpoint does."""

from __future__ import annotations

import safetensors.torch
import torch
from torch import Tensor

from diffhook.capture.checkpoints.weights import Names, read_parameters
from diffhook.gradients import PerSampleGradients
from diffhook.log import Snapshot


def read_snapshot(snapshot: Snapshot, wanted: Names) -> dict[str, Tensor]:
    """Parameter → its values.

    Args:
        wanted: the trained parameters and their shapes.

    Raises:
        LogError: the file is gone, or not what it was.
        ConfigurationError: it is of another model.
    """
    if snapshot.reference is None:
        return safetensors.torch.load(snapshot.parameters())
    return read_parameters(snapshot.reference.located(), wanted, ema=snapshot.reference.ema)


def load_snapshot(engine: PerSampleGradients, snapshot: Snapshot) -> None:
    """Put a snapshot's parameters into the engine's model, within
    :func:`~diffhook.capture.model.borrowing.borrowed`."""
    wanted = {name: list(parameter.shape) for name, parameter in engine.trained.items()}
    values = read_snapshot(snapshot, wanted)
    with torch.no_grad():
        for name, parameter in engine.trained.items():
            parameter.copy_(values[name])
