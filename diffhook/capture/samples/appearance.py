"""What the clean samples of a batch look like, in a few numbers."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from diffhook.capture.samples.inputs import default_inputs
from diffhook.errors import ConfigurationError


def images_of(batch: Any) -> Tensor | None:
    """(B, …) the images, latents or the like that a loop's batch holds; None if it is not known to.

    Where they are found: see :func:`~diffhook.capture.samples.inputs.default_inputs`.
    """
    with suppress(ConfigurationError):
        clean, _ = default_inputs(batch)
        if clean.dim() > 2 and clean.numel():
            return clean.detach()
    return None


def appearance(clean: Tensor) -> Tensor:
    """(B, 3) float32: the :data:`~diffhook.appearance.STATISTICS` of each sample.

    Args:
        clean: (B, …, H, W), of any real dtype.
    """
    values = clean.float()
    flat = values.flatten(1)
    steps = [values.diff(dim=axis).square().flatten(1) for axis in (-1, -2) if values.shape[axis] > 1]
    rough = torch.cat(steps, 1).mean(1).sqrt() if steps else torch.zeros(len(flat), device=flat.device)
    return torch.stack([flat.mean(1), flat.std(1, correction=0), rough], 1)
