"""See which training images drive a diffusion model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # for type checkers and editors
    from diffhook.analysis import Execution as Execution
    from diffhook.analysis import bias as bias
    from diffhook.analysis import compare as compare
    from diffhook.analysis import influence as influence
    from diffhook.analysis import influence_by_timestep as influence_by_timestep
    from diffhook.analysis import influential_subset as influential_subset
    from diffhook.analysis import near_duplicates as near_duplicates
    from diffhook.analysis import outliers as outliers
    from diffhook.analysis import self_influence as self_influence
    from diffhook.analysis import without as without
    from diffhook.capture import Alerts as Alerts
    from diffhook.capture import DiffusionObjective as DiffusionObjective
    from diffhook.capture import Grid as Grid
    from diffhook.capture import MinSNR as MinSNR
    from diffhook.capture import Objective as Objective
    from diffhook.capture import Probe as Probe
    from diffhook.capture import Quarantine as Quarantine
    from diffhook.capture import Throttle as Throttle
    from diffhook.capture.checkpoints import from_checkpoints as from_checkpoints
    from diffhook.capture.model.pipeline import SavedPipeline as SavedPipeline
    from diffhook.capture.model.trajectory import Trajectory as Trajectory
    from diffhook.capture.objective.measured import Measured as Measured
    from diffhook.log import RunLog as RunLog
    from diffhook.log import open_log as open_log
    from diffhook.queries.generated import generate as generate
    from diffhook.queries.query import query as query

_HOMES = {
    "Alerts": "diffhook.capture",
    "DiffusionObjective": "diffhook.capture",
    "Execution": "diffhook.analysis",
    "Grid": "diffhook.capture",
    "Measured": "diffhook.capture.objective.measured",
    "MinSNR": "diffhook.capture",
    "Objective": "diffhook.capture",
    "Probe": "diffhook.capture",
    "Quarantine": "diffhook.capture",
    "RunLog": "diffhook.log",
    "SavedPipeline": "diffhook.capture.model.pipeline",
    "Throttle": "diffhook.capture",
    "Trajectory": "diffhook.capture.model.trajectory",
    "bias": "diffhook.analysis",
    "compare": "diffhook.analysis",
    "from_checkpoints": "diffhook.capture.checkpoints",
    "generate": "diffhook.queries.generated",
    "influence": "diffhook.analysis",
    "influence_by_timestep": "diffhook.analysis",
    "influential_subset": "diffhook.analysis",
    "near_duplicates": "diffhook.analysis",
    "open_log": "diffhook.log",
    "outliers": "diffhook.analysis",
    "query": "diffhook.queries.query",
    "self_influence": "diffhook.analysis",
    "without": "diffhook.analysis",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    # Lazily: reading a log must not import torch, nor training the analyzer.
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'diffhook' has no attribute {name!r}")
