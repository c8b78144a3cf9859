"""The probe at the end of a training: of all samples whose inputs are known, as far as the budget goes."""

from __future__ import annotations

from dataclasses import replace

from diffhook.capture.objective import Objective
from diffhook.capture.probes.affordable import affordable
from diffhook.capture.probes.grid import Grid
from diffhook.capture.probes.probe import Probe
from diffhook.console import announce
from diffhook.gradients import PerSampleGradients
from diffhook.words import duration, plural

AT_END = Probe(samples=None)
"""Of all samples: the usual grid, with replicates, and which labels would fit them better."""


def last_probe(
    probe: Probe,
    engine: PerSampleGradients,
    objective: Objective,
    budget: float,
    *,
    processes: int = 1,
    grid: Grid | None = None,
) -> Probe | None:
    """What is to be measured, or None; either is told.

    Args:
        engine: for probes, on the trained model.
        budget: seconds.
        processes: that share the samples.
        grid: that the log has rows on; None: there are none.
    """
    probe = replace(probe, grid=grid or probe.grid)
    samples = len(probe.ids(len(probe.dataset)))
    population = probe.population or samples
    if samples * processes * 2 < population or not samples:
        _tell_none(f"inputs are known of {samples:,} of {population:,} samples")
        return None
    found = affordable(probe, engine, objective, budget, processes=processes, same_grid=grid is not None)
    takes, left = duration(found.seconds), duration(max(budget, 0.0))
    if found.probe is None:
        left = "a little less" if left == takes else left
        _tell_none(
            f"of {samples:,} samples it would take {takes}, and the budget has {left} left. A larger "
            "overhead= allows it, and probe=Probe(...) takes what it needs"
        )
        return None
    of = f"all {samples:,} samples"
    if processes == 1 and samples < population:
        of = f"the {samples:,} of {population:,} samples whose inputs are known"
    announce(
        f"diffhook: the training is over; probing {of}, {plural(found.probe.grid.rows, 'row')} each, about "
        f"{takes} (probe=False: never)"
    )
    return found.probe


def _tell_none(why: str) -> None:
    announce(f"diffhook: no probe at the end: {why}. `diffhook checkpoints` measures samples later")
