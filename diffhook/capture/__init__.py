"""During training: what to capture when, the recorder, probes at snapshots, alerts."""

from diffhook.capture.alerts import (
    Alert,
    Alerts,
    Detector,
    Dominating,
    Drift,
    LossOutlier,
    NonFinite,
    NormOutlier,
    Quarantine,
    RepeatedOffender,
)
from diffhook.capture.diffusion import DiffusionObjective
from diffhook.capture.grid import Grid, measure
from diffhook.capture.objective import Objective
from diffhook.capture.plan import Plan
from diffhook.capture.probe import Probe
from diffhook.capture.recorder import Recorder

__all__ = [
    "Alert",
    "Alerts",
    "Detector",
    "DiffusionObjective",
    "Dominating",
    "Drift",
    "Grid",
    "LossOutlier",
    "NonFinite",
    "NormOutlier",
    "Objective",
    "Plan",
    "Probe",
    "Quarantine",
    "Recorder",
    "RepeatedOffender",
    "measure",
]
