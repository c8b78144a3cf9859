"""See which training images drive a diffusion model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from diffhook.analysis import (
        Execution,
        bias,
        compare,
        influence,
        influence_by_timestep,
        near_duplicates,
        outliers,
        self_influence,
        without,
    )
    from diffhook.capture import Alerts, DiffusionObjective, Grid, MinSNR, Probe, Quarantine
    from diffhook.capture.checkpoints import from_checkpoints
    from diffhook.capture.measurement import Measured
    from diffhook.capture.pipeline import SavedPipeline
    from diffhook.capture.trajectory import Trajectory
    from diffhook.log import RunLog, open_log
    from diffhook.queries.generated import generate
    from diffhook.queries.query import query

_HOMES = {
    "Alerts": "diffhook.capture",
    "DiffusionObjective": "diffhook.capture",
    "Execution": "diffhook.analysis",
    "Grid": "diffhook.capture",
    "Measured": "diffhook.capture.measurement",
    "MinSNR": "diffhook.capture",
    "Probe": "diffhook.capture",
    "Quarantine": "diffhook.capture",
    "RunLog": "diffhook.log",
    "SavedPipeline": "diffhook.capture.pipeline",
    "Trajectory": "diffhook.capture.trajectory",
    "bias": "diffhook.analysis",
    "compare": "diffhook.analysis",
    "from_checkpoints": "diffhook.capture.checkpoints",
    "generate": "diffhook.queries.generated",
    "influence": "diffhook.analysis",
    "influence_by_timestep": "diffhook.analysis",
    "near_duplicates": "diffhook.analysis",
    "open_log": "diffhook.log",
    "outliers": "diffhook.analysis",
    "query": "diffhook.queries.query",
    "self_influence": "diffhook.analysis",
    "without": "diffhook.analysis",
}
__all__ = [
    "Alerts",
    "DiffusionObjective",
    "Execution",
    "Grid",
    "Measured",
    "MinSNR",
    "Probe",
    "Quarantine",
    "RunLog",
    "SavedPipeline",
    "Trajectory",
    "bias",
    "compare",
    "from_checkpoints",
    "generate",
    "influence",
    "influence_by_timestep",
    "near_duplicates",
    "open_log",
    "outliers",
    "query",
    "self_influence",
    "without",
]


def __getattr__(name: str) -> Any:
    # Lazily: reading a log must not import torch, nor training the analyzer.
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'diffhook' has no attribute {name!r}")
