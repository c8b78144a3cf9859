"""Where a resumed run continues the log."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from diffhook.errors import LogError
from diffhook.log import open_log
from diffhook.log.store import Location

_STATE = "diffhook.json"  # in a checkpoint's folder; scripts parse names that begin "checkpoint"


def write_state(folder: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    if state:
        Path(folder, _STATE).write_text(json.dumps(dict(state)))


def read_state(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What :func:`write_state` wrote; empty for a checkpoint written without us."""
    path = Path(folder, _STATE)
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def steps_taken(optimizer: torch.optim.Optimizer) -> int:
    """The optimiser's own count of its steps; 0 if it keeps none, as SGD."""
    counts = [state["step"] for state in optimizer.state.values() if "step" in state]
    return max((int(count) for count in counts), default=0)


def steps_logged(location: Location) -> int:
    """How many steps the log there has seen; 0 where there is none."""
    try:
        steps = open_log(location).train["step"]
    except LogError:
        return 0
    return int(steps.max()) + 1 if len(steps) else 0
