"""What the clean samples of a batch look like, in a few numbers."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from diffhook.capture.samples.inputs import default_inputs
from diffhook.errors import ConfigurationError


def images_of(batch: Any) -> Tensor | None:
    """(B, …) the images, latents or the like that a loop's batch holds; None if it is not known to.

    Where :func:`~diffhook.capture.samples.inputs.default_inputs` finds them; in a dict of other names, the
    only tensor of images; in a list that begins with another batch, those of it.
    """
    clean: Tensor | None = None
    with suppress(ConfigurationError):
        clean, _ = default_inputs(batch)
    if clean is None and isinstance(batch, Mapping):
        found = [each for each in batch.values() if isinstance(each, Tensor) and each.dim() > 3]
        clean = found[0] if len(found) == 1 else None
    elif clean is None and isinstance(batch, tuple | list) and batch:
        clean = images_of(batch[0])
    return clean.detach() if clean is not None and clean.dim() > 2 and clean.numel() else None


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
