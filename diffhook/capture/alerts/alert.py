"""What an alert says."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from diffhook.log import Rows


@dataclass(frozen=True)
class Alert:
    """One finding.

    Attributes:
        kind: the detector's name.
        level: "info", "warning" or "error".
        samples: ids of the samples it names; none where it is about the run.
        step: optimiser steps taken before the one that it is about.
        timestep: diffusion timestep; NaN where it is about no single one.
        value: the number that was found.
        threshold: the number it was compared with.
        message: one sentence for a person.
        layer: of the parameters whose gradients are not finite, the first in backward order.
        cause: of a record of the quarantine, the kind of the alert that led to it; None: by hand.
        rank: the process that found it.
        time: when, in seconds since 1970.
    """

    kind: str
    level: str
    samples: list[int]
    step: int
    timestep: float
    value: float
    threshold: float
    message: str
    layer: str | None = None
    cause: str | None = None
    rank: int = 0
    time: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """The alert as a JSON object; numbers that JSON does not know become strings."""
        return {
            key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in asdict(self).items()
        }


def about_row(kind: str, rows: Rows, index: int, value: float, threshold: float, message: str) -> Alert:
    """A warning that names the sample of one row."""
    return Alert(
        kind=kind,
        level="warning",
        samples=[int(rows["sample"][index])],
        step=int(rows["step"][index]),
        timestep=float(rows["timestep"][index]),
        value=value,
        threshold=threshold,
        message=message,
    )
