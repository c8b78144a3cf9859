"""Which probe of all samples a budget of seconds affords, at the end of a training."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import NamedTuple

from diffhook.capture.model.borrowing import undisturbed
from diffhook.capture.objective import Objective
from diffhook.capture.probes.label_contrast import LabelContrasts
from diffhook.capture.probes.probe import Probe
from diffhook.gradients import PerSampleGradients

_SURVEY = 4.0  # the first pass takes at most so many times what later ones take


class Affordable(NamedTuple):
    """What a budget allows.

    Attributes:
        probe: None: none.
        seconds: what it takes, or the cheapest would have taken, the trial included.
    """

    probe: Probe | None
    seconds: float


def affordable(
    probe: Probe,
    engine: PerSampleGradients,
    objective: Objective,
    seconds: float,
    *,
    processes: int = 1,
    same_grid: bool = False,
) -> Affordable:
    """As much of a probe as so many seconds allow: all of it; without replicates, which tell how far noise
    moves a score; at half of the timesteps; without labels, too; or nothing.

    Some samples are measured on trial. The model comes back as it was.

    Args:
        engine: for probes, on the trained model.
        processes: that share the samples.
        same_grid: all of the grid, or nothing: there are rows on it already.
    """
    began = time.perf_counter()
    until = began + seconds  # the trial is not for nothing
    trial = _Trial(probe, engine, objective, processes)
    smaller = [] if same_grid else _smaller(probe)
    least = smaller[-1] if smaller else probe
    first = trial.row(1) / _SURVEY * least.grid.rows
    if first > until - time.perf_counter():
        return _none(first, began)
    row = trial.row(2)
    if row * least.grid.rows > until - time.perf_counter():
        return _none(row * least.grid.rows, began)
    labels = trial.labels() if probe.label_timesteps else 0.0
    choices = [(each, labels) for each in (probe, *smaller)]
    choices.append((replace(least, label_timesteps=0), 0.0))
    costs = [Affordable(each, row * each.grid.rows + more) for each, more in choices]
    left = until - time.perf_counter()
    return next((each for each in costs if each.seconds <= left), None) or _none(costs[-1].seconds, began)


def _none(seconds: float, began: float) -> Affordable:
    """Too dear; the trial that showed it has taken its time, too."""
    return Affordable(None, seconds + time.perf_counter() - began)


def _smaller(probe: Probe) -> list[Probe]:
    grid = replace(probe.grid, replicates=1)
    halved = replace(grid, timesteps=grid.count // 2) if isinstance(grid.timesteps, int) else grid
    return [replace(probe, grid=grid), replace(probe, grid=halved)]


class _Trial:
    """Measures a few samples, to say what all of them take."""

    def __init__(
        self,
        probe: Probe,
        engine: PerSampleGradients,
        objective: Objective,
        processes: int,
    ) -> None:
        self._probe, self._engine, self._objective = probe, engine, objective
        samples = probe.ids(len(probe.dataset))
        self._few = samples[: probe.batch_size]
        self._times = len(samples) / processes / len(self._few)

    def row(self, timesteps: int) -> float:
        """Seconds for one row of every sample, judged by a few at so many timesteps."""
        return self._times * self._run(timesteps) / timesteps

    def labels(self) -> float:
        """Seconds for the labels of all, judged by one timestep of a few."""
        one = replace(self._probe, label_timesteps=1)
        began = time.perf_counter()
        with undisturbed(self._engine.model):
            contrasts = one.contrasts(self._engine.model, self._objective)
        learning = time.perf_counter() - began
        if contrasts is None:
            return 0.0
        each = max(self._run(1, contrasts) - self._run(1), 0.0)
        return self._probe.label_timesteps * (learning + self._times * each)

    def _run(self, timesteps: int, contrasts: LabelContrasts | None = None) -> float:
        chosen = self._probe.grid.timesteps_of(self._objective)[:timesteps]
        grid = replace(self._probe.grid, timesteps=chosen, replicates=1)
        some = replace(self._probe, grid=grid)
        began = time.perf_counter()
        for _ in some.run(
            self._engine, self._objective, self._few, contrasts, step=0, lr_sum=0.0, batch_per_step=1
        ):
            pass  # what is measured is not wanted
        return time.perf_counter() - began
