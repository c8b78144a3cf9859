"""Which samples are broken, mislabelled, or pull the model alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from diffhook.analysis.defaults import as_log, best_source
from diffhook.analysis.execution import MEMORY, Execution
from diffhook.analysis.ranking import Ranking
from diffhook.analysis.signals import SIGNALS, Found, Signal, View
from diffhook.analysis.standardize import robust_deviations
from diffhook.analysis.tables import source_table
from diffhook.errors import ConfigurationError
from diffhook.log import RunLog
from diffhook.log.store import Location

PAIRWISE = 20_000  # samples up to which all pairs are compared unless asked
_HIGHEST = 8.0  # deviations; beyond it a part says no more


def outliers(
    log: RunLog | Location,
    source: str | None = None,
    parts: Sequence[str] | None = None,
    *,
    client: Any = None,
    scheduler: Any = None,
    memory: int = MEMORY,
    progress: bool = False,
) -> Ranking:
    """Rank samples by how unlike the others they are, with the reasons in words.

    Each part is a number per sample (``Ranking.parts``). The score is the root mean square over
    parts of how many robust standard deviations the sample lies above the median sample, from 0 to
    8 in each, so that one loud part is heard among quiet ones; of a single part, the part itself.
    A norm that is not finite comes before everything.

    Goes over the rows shard by shard, and holds some numbers for each sample. What is usual at a
    timestep is learned from 2²¹ rows, evenly spaced, where there are more.

    Args:
        source: "train" or "probe"; by default the best there is: probes, where they hold all samples that
            were trained on.
        parts: which signals, of :data:`diffhook.analysis.signals.SIGNALS`: "norm", "repeat", "loss",
            "input", "tracin", "retrac", "duplicate". By default all that the log can tell; "duplicate", which
            compares all pairs, for up to 20,000 samples. A log captured with projection_dim=0 has
            the first four.
        client, scheduler, memory, progress: as for :func:`diffhook.influence`.

    Raises:
        LogError: no rows.
        ConfigurationError: no such part, or none that counts can be told.
    """
    log, execution = as_log(log), Execution(client, scheduler, memory, progress)
    source = best_source(log, execution=execution) if source is None else source
    view = View(log, source, source_table(log, source, projected=False), execution)
    found = {s.name: told for s in _signals(view, parts) if (told := s.look(view)) is not None}
    counted = [told for name, told in found.items() if SIGNALS[name].counts]
    if not counted:
        asked = "" if parts is None else f" from {', '.join(parts)}"
        raise ConfigurationError(
            f"nothing to rank by{asked}: expected norm, repeat, loss, input, tracin or retrac"
        )
    if len(counted) == 1:
        scores = np.nan_to_num(np.array(counted[0].scores, np.float64))
    else:
        scores = np.sqrt(np.mean([np.square(_height(told)) for told in counted], axis=0))
    flags: list[list[str]] = [[] for _ in view.sample_ids]
    infinite = view.norms.infinite
    visits = view.norms.seen + infinite
    for index in np.flatnonzero(infinite):
        flags[index].append(f"gradient not finite on {infinite[index]:.0f} of {visits[index]:.0f} visits")
    for told in found.values():
        for position, reason in told.reasons.items():
            flags[position].append(reason)
    scores[infinite > 0] = np.inf
    title = f"outliers: {', '.join(name for name in found if SIGNALS[name].counts)} ({source} rows)"
    values = {name: np.asarray(told.scores, np.float64) for name, told in found.items()}
    return Ranking.sort(view.sample_ids, scores, flags, title, values, log.names())


def _signals(view: View, names: Sequence[str] | None) -> list[Signal]:
    """The signals asked for, or all that the table can serve."""
    if names is None:
        able = [s for s in SIGNALS.values() if view.table.dim or not s.projected]
        return [s for s in able if s.name != "duplicate" or len(view.sample_ids) <= PAIRWISE]
    unknown = [name for name in names if name not in SIGNALS]
    if unknown:
        raise ConfigurationError(f"no outlier part {unknown[0]!r}; there are {', '.join(SIGNALS)}")
    return [SIGNALS[name] for name in names]


def _height(found: Found) -> Any:
    """(N,) robust deviations above the median sample, within [0, 8]; 0 for samples without a score."""
    return np.nan_to_num(robust_deviations(found.scores)).clip(0, _HIGHEST)
