"""Alerts: rows that misbehave while the model trains."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from diffhook.log import Rows


@dataclass(frozen=True)
class Alert:
    """One finding.

    Attributes:
        kind: the detector's name.
        level: "warning" or "error".
        samples: ids of the samples it names.
        step: optimiser step.
        timestep: diffusion timestep.
        value: the number that was found.
        threshold: the number it was compared with.
        message: one sentence for a person.
    """

    kind: str
    level: str
    samples: list[int]
    step: int
    timestep: float
    value: float
    threshold: float
    message: str

    def to_json(self) -> dict[str, Any]:
        """The alert as a JSON object; numbers that JSON does not know become strings."""
        return {
            key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in asdict(self).items()
        }


class Detector(ABC):
    """Looks at rows as they are captured, on every rank."""

    @abstractmethod
    def look(self, rows: Rows) -> Iterator[Alert]:
        """Alerts for these rows; the detector may remember them for the next."""


class NonFinite(Detector):
    """Names samples whose loss or gradient is NaN or infinite."""

    def look(self, rows: Rows) -> Iterator[Alert]:
        found = np.flatnonzero(~np.isfinite(rows["grad_norm"]))
        if not len(found):
            return
        # One alert for a whole batch: when a model diverges, every sample of it is here.
        samples = rows["sample"][found].tolist()
        who = f"sample {samples[0]} has" if len(samples) == 1 else f"{len(samples)} samples have"
        named = ", ".join(map(str, samples[:8])) + (" …" if len(samples) > 8 else "")
        yield Alert(
            kind="non-finite",
            level="error",
            samples=samples,
            step=int(rows["step"][found[0]]),
            timestep=float(rows["timestep"][found[0]]),
            value=float(rows["grad_norm"][found[0]]),
            threshold=math.inf,
            message=f"{who} a gradient that is not finite"
            + (f" ({named}): the model diverges, or" if len(samples) > 1 else ":")
            + " look for NaN or infinite pixels",
        )


class NormOutlier(Detector):
    """Names samples whose gradient norm is far outside that of others at similar timesteps.

    Norms depend on the timestep, so each is compared with the last ``window`` norms of its own
    timestep bin: alert when (log norm − median) / (1.4826 · MAD) exceeds ``threshold``.

    Args:
        threshold: robust standard deviations.
        bins: number of timestep bins over [0, num_timesteps).
        window: norms remembered per bin.
        warm_up: norms of a bin needed before it alerts.
    """

    def __init__(
        self,
        threshold: float = 4.0,
        *,
        num_timesteps: int = 1000,
        bins: int = 10,
        window: int = 500,
        warm_up: int = 50,
    ) -> None:
        self.threshold = threshold
        self.warm_up = warm_up
        self._width = num_timesteps / bins
        self._seen = [deque[float](maxlen=window) for _ in range(bins)]

    def look(self, rows: Rows) -> Iterator[Alert]:
        for index, norm in enumerate(rows["grad_norm"]):
            timestep = float(rows["timestep"][index])
            if not (math.isfinite(norm) and norm > 0 and math.isfinite(timestep)):
                continue
            position = min(max(int(timestep / self._width), 0), len(self._seen) - 1)
            seen = self._seen[position]
            if len(seen) >= self.warm_up:
                yield from self._compare(rows, index, np.asarray(seen))
            seen.append(math.log(norm))

    def _compare(self, rows: Rows, index: int, seen: np.ndarray) -> Iterator[Alert]:
        norm = float(rows["grad_norm"][index])
        median = float(np.median(seen))
        spread = max(1.4826 * float(np.median(np.abs(seen - median))), 1e-6)
        deviation = (math.log(norm) - median) / spread
        if deviation <= self.threshold:
            return
        sample, timestep = int(rows["sample"][index]), float(rows["timestep"][index])
        ratio = norm / math.exp(median)
        yield Alert(
            kind="norm-outlier",
            level="warning",
            samples=[sample],
            step=int(rows["step"][index]),
            timestep=timestep,
            value=deviation,
            threshold=self.threshold,
            message=f"sample {sample} pulls {ratio:.1f} times as hard as is usual near timestep "
            f"{timestep:g} ({deviation:.1f} robust deviations; {self.threshold:g} are allowed)",
        )


def default_detectors() -> list[Detector]:
    return [NonFinite(), NormOutlier()]
