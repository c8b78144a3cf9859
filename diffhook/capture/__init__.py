"""During training: what to capture when, the recorder, probes at snapshots, alerts."""

from diffhook.capture.alerts import Alert, Detector, NonFinite, NormOutlier
from diffhook.capture.diffusion import DiffusionObjective
from diffhook.capture.grid import Grid, measure
from diffhook.capture.objective import Objective
from diffhook.capture.plan import Plan
from diffhook.capture.probe import Probe
from diffhook.capture.recorder import Recorder

__all__ = [
    "Alert",
    "Detector",
    "DiffusionObjective",
    "Grid",
    "NonFinite",
    "NormOutlier",
    "Objective",
    "Plan",
    "Probe",
    "Recorder",
    "measure",
]
