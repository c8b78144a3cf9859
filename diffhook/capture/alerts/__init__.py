"""Alerts: rows that misbehave while the model trains.

    rows → detectors → limit → the log, sinks, quarantine
         → throttle → factors of samples' losses

A detector is one file with one registered class. Everything here runs on every rank, on what that rank
sees, without collectives.
"""

from diffhook.capture.alerts.alert import Alert
from diffhook.capture.alerts.delivery import Sink
from diffhook.capture.alerts.detector import DETECTORS, Detector, all_detectors, register
from diffhook.capture.alerts.dominating import Dominating
from diffhook.capture.alerts.drift import Drift
from diffhook.capture.alerts.input_outlier import InputOutlier
from diffhook.capture.alerts.loss_outlier import LossOutlier
from diffhook.capture.alerts.non_finite import NonFinite
from diffhook.capture.alerts.norm_outlier import NormOutlier
from diffhook.capture.alerts.quarantine import Quarantine
from diffhook.capture.alerts.repeated_offender import RepeatedOffender
from diffhook.capture.alerts.settings import Alerts
from diffhook.capture.alerts.sinks import Brief, to_logging
from diffhook.capture.alerts.throttle import Factors, Throttle
from diffhook.capture.alerts.watch import Watch

__all__ = [
    "DETECTORS",
    "Alert",
    "Alerts",
    "Brief",
    "Detector",
    "Dominating",
    "Drift",
    "Factors",
    "InputOutlier",
    "LossOutlier",
    "NonFinite",
    "NormOutlier",
    "Quarantine",
    "RepeatedOffender",
    "Sink",
    "Throttle",
    "Watch",
    "all_detectors",
    "register",
    "to_logging",
]
