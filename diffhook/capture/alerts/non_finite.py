"""NaN or infinite: a broken sample, or a model that is lost."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from diffhook.capture.alerts.alert import Alert
from diffhook.capture.alerts.detector import DEFAULT_RATE, Detector, register
from diffhook.log import Rows
from diffhook.log.samples import sample_words

_SHOWN = 8  # samples a message names
_OVERFLOWS = 10  # steps in a row that mixed precision may skip while it finds its loss scale


@register
class NonFinite(Detector):
    """Names samples whose loss or gradient is NaN or infinite, and says when the whole model is.

    A whole batch of non-finite gradients is no sample's fault: one alert tells that the model is
    lost, and which sample went before. Whole batches in skipped steps are a loss scale's overflows and
    alarm only when there is no end to them. A step of one row counts as a whole batch where the step
    before was not finite either, and as a broken sample otherwise.
    """

    kind = "non-finite"

    def __init__(self, rate: float = DEFAULT_RATE) -> None:
        super().__init__(rate)
        self._suspect: tuple[int, list[int]] | None = None  # last step that had some; no sound one since
        self._lost = 0  # steps in a row of which nothing was finite

    def look(self, rows: Rows) -> Iterator[Alert]:
        bad = ~np.isfinite(rows["grad_norm"]) | np.isinf(rows["loss"])  # a NaN loss is one not known
        found = np.flatnonzero(bad)
        lost = len(found) == len(bad) and (len(bad) > 1 or self._suspect is not None)
        self._lost = self._lost + 1 if lost else 0
        if lost:
            skipped = not np.any(rows["lr"] > 0)
            if self._lost == (_OVERFLOWS if skipped else 1):
                self._lost = max(self._lost, _OVERFLOWS)
                yield self._model_lost(rows)
        elif not len(found):
            self._suspect = None
        else:
            samples = rows["sample"][found].tolist()
            step = int(rows["step"][found[0]])
            self._suspect = step, samples
            yield self._samples_broken(rows, int(found[0]), samples)

    def _samples_broken(self, rows: Rows, first: int, samples: list[int]) -> Alert:
        who = f"{self.who(samples[0])} has a gradient that is"
        if len(samples) > 1:
            who = f"{len(samples)} samples ({self._all(samples)}) have gradients that are"
        return self._alert(
            rows,
            first,
            samples,
            f"{who} not finite: look for NaN or infinite pixels",
        )

    def _model_lost(self, rows: Rows) -> Alert:
        step = int(rows["step"][0])
        message = f"none of the {len(rows['sample'])} gradients of the step is finite: the model is lost"
        if self._suspect is not None:
            since, samples = self._suspect
            message += f", probably since step {since} trained on sample {self._all(samples)}"
        return self._alert(rows, 0, [], f"{message}; go back to a snapshot before step {step}")

    def _alert(self, rows: Rows, index: int, samples: list[int], message: str) -> Alert:
        return Alert(
            kind=self.kind,
            level="error",
            samples=samples,
            step=int(rows["step"][index]),
            timestep=float(rows["timestep"][index]) if samples else math.nan,
            value=float(rows["grad_norm"][index]),
            threshold=math.inf,
            message=message,
        )

    def _all(self, samples: list[int]) -> str:
        shown = ", ".join(sample_words(sample, self.names) for sample in samples[:_SHOWN])
        return shown + (" …" if len(samples) > _SHOWN else "")
