"""During training: what to capture when, the recorder, probes at snapshots, alerts."""

from diffhook.capture.alerts import (
    Alert,
    Alerts,
    Detector,
    Dominating,
    Drift,
    InputOutlier,
    LossOutlier,
    NonFinite,
    NormOutlier,
    Quarantine,
    RepeatedOffender,
    Throttle,
)
from diffhook.capture.objective import Objective, Prediction
from diffhook.capture.objective.diffusion import DiffusionObjective
from diffhook.capture.objective.weighting import MinSNR
from diffhook.capture.plan import Plan
from diffhook.capture.probes.grid import Grid, measure
from diffhook.capture.probes.probe import Probe
from diffhook.capture.recording.recorder import Recorder

__all__ = [
    "Alert",
    "Alerts",
    "Detector",
    "DiffusionObjective",
    "Dominating",
    "Drift",
    "Grid",
    "InputOutlier",
    "LossOutlier",
    "MinSNR",
    "NonFinite",
    "NormOutlier",
    "Objective",
    "Plan",
    "Prediction",
    "Probe",
    "Quarantine",
    "Recorder",
    "RepeatedOffender",
    "Throttle",
    "measure",
]
