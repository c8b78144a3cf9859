"""Per-sample gradients of one batch: exact norms and random projections. torch only."""

from diffhook.gradients.coverage import Coverage
from diffhook.gradients.engine import PerSampleGradients
from diffhook.gradients.guard import Guard, Guarded, on_gradient
from diffhook.gradients.local_hook import LocalHook
from diffhook.gradients.sketch import Sketch, check_projection_dim
from diffhook.gradients.tape import Tape

__all__ = [
    "Coverage",
    "Guard",
    "Guarded",
    "LocalHook",
    "PerSampleGradients",
    "Sketch",
    "Tape",
    "check_projection_dim",
    "on_gradient",
]
