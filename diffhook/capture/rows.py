"""A pass that the engine has finished, as rows of the log."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffhook.gradients import PerSampleGradients
from diffhook.log import Rows
from diffhook.log.schema import BY_NAME


def make_rows(engine: PerSampleGradients, *, factors: Tensor | None = None, **columns: Any) -> Rows:
    """Norms, unit projections and the other ``columns``, in the schema's dtypes. Waits for the device.

    Args:
        factors: (B,) by which the engine's gradients are too large; None: 1.
    """
    rows = {name: np.asarray(values, BY_NAME[name].dtype) for name, values in columns.items()}
    norms = engine.norms
    rows["grad_norm"] = norms.cpu().numpy() if factors is None else (norms.cpu() / factors).numpy()
    if engine.sketch is not None:
        # A gradient that is zero or not finite has no direction. Its norm says which it was.
        usable = (torch.isfinite(norms) & (norms > 0))[:, None]
        unit = torch.where(usable, engine.projections / norms[:, None], 0.0)
        rows["projection"] = unit.to(projection_torch_dtype(engine)).cpu().numpy()
    return rows


def projection_torch_dtype(engine: PerSampleGradients) -> torch.dtype:
    """Of stored projections: float32 where whole gradients are kept, else float16."""
    return torch.float32 if engine.full else torch.float16
