"""Values that decide something, brought to the host."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def waits(tensor: Tensor) -> bool:
    """Whether to read a tensor's values is to wait for its device."""
    return tensor.device.type != "cpu"


def read(values: Tensor) -> list[Any]:
    """The values of a tensor of one axis, as Python numbers.

    Waits for the tensor's device. Nothing else in this package does, so that whoever looks for waits, or
    wants to run the engine on tensors without values (meta), has one place to look at.
    """
    return list(values.tolist())
