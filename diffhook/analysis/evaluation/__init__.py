"""How good scores are: against retrained models, known sources, and known outliers."""

from diffhook.analysis.evaluation.detection import Detection, detection
from diffhook.analysis.evaluation.lds import LDS, lds, lds_lead
from diffhook.analysis.evaluation.removal import Removal, removal
from diffhook.analysis.evaluation.retraining import Retrained, half_subsets, read_retrained, retrain
from diffhook.analysis.evaluation.tracing import Tracing, tracing

__all__ = [
    "LDS",
    "Detection",
    "Removal",
    "Retrained",
    "Tracing",
    "detection",
    "half_subsets",
    "lds",
    "lds_lead",
    "read_retrained",
    "removal",
    "retrain",
    "tracing",
]
