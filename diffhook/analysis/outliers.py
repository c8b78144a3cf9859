"""Which samples are broken, mislabelled, or move the model by themselves."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from diffhook.analysis.defaults import as_log, best_source
from diffhook.analysis.execution import HERE, Execution
from diffhook.analysis.fisher import combined
from diffhook.analysis.non_finite import non_finite_samples
from diffhook.analysis.ranking import Ranking
from diffhook.analysis.reason import COPY, Reason
from diffhook.analysis.roles import regularisation_images
from diffhook.analysis.signals import PAIRWISE, SIGNALS, Found, Signal, View
from diffhook.analysis.tables import source_table
from diffhook.errors import ConfigurationError
from diffhook.log import RunLog
from diffhook.log.store import Location
from diffhook.words import guess

UNUSUAL = 2.0
"""A score that about one sound sample in a hundred reaches in the sum of several signals. Each sample with
more has a reason."""


def outliers(
    log: RunLog | Location,
    source: str | None = None,
    signals: Sequence[str] | None = None,
    *,
    labels: Mapping[int, Hashable] | Sequence[Hashable] | None = None,
    execution: Execution = HERE,
) -> Ranking:
    """Rank samples by how unlike the others they are, with the reasons in words.

    Each signal is a number per sample (``Ranking.signals``). The score is the sum over signals of −log10 of
    the probability of so high a number (Fisher's method, see :mod:`diffhook.analysis.fisher`); of a single
    signal, the signal itself. By default appearance and loss count, and on the training's own rows the norm;
    self-influence, repeats and the like stand beside the score with their reasons, for counting them
    loses what the others find. Samples whose gradient was not finite come before everything, those first
    whose was so first.

    Goes over the rows shard by shard, and holds some numbers for each sample. What is usual at a
    timestep is learned from 2²¹ rows, evenly spaced, where there are more.

    Args:
        source: "train" or "probe"; by default the best there is: probes, where they hold all samples that
            were trained on.
        signals: which signals, of :data:`diffhook.analysis.signals.SIGNALS`; all of these that can rank
            count. By default all that the log can tell; "duplicate", which compares all pairs, for up
            to 20,000 samples. A log captured with projection_dim=0 has "norm", "repeat", "loss", "input"
            and, where there are probes, "equal" and, where these tried labels, "label".
        labels: of the samples, by id or in the dataset's order, for "label"; by default the classes that
            probes were told.
        execution: as for :func:`diffhook.influence`.

    Raises:
        LogError: no rows.
        ConfigurationError: no such signal, or none that counts can be told.
    """
    log = as_log(log)
    source = best_source(log, execution=execution) if source is None else source
    known = labels if labels is None or isinstance(labels, Mapping) else dict(enumerate(labels))
    view = View(log, source, source_table(log, source, projected=False), execution, known)
    found = {s.name: seen for s in _signals(view, signals) if (seen := s.look(view)) is not None}
    counted = _counted(found, source, signals)
    scores = np.nan_to_num(counted[0]) if len(counted) == 1 else combined(counted)
    broken = non_finite_samples(view)
    scores[list(broken)] = np.inf
    reasons: list[list[str]] = [[] for _ in view.sample_ids]
    for i, told in broken.items():
        reasons[i].append(Reason(told.words, "not finite", "not finite"))
    for signal in found.values():
        for position, reason in signal.reasons.items():
            if reason.kind != COPY or COPY not in {Reason.of(given).kind for given in reasons[position]}:
                reasons[position].append(reason)  # gradients and pixels may tell the same copies
    together = {name: found[name] for name in _names(found, source, signals)}
    for each in reasons:
        each.sort(key=lambda reason: Reason.of(reason).place)
    for i in np.flatnonzero(scores > UNUSUAL).tolist() if len(together) > 1 else ():
        reasons[i] = reasons[i] or [_in_sum(i, together)]
    own = next((told.labels for told in found.values() if told.labels is not None), None)
    order = np.array([*broken, *(i for i in range(len(reasons)) if i not in broken)], np.intp)
    ranking = Ranking.sort(
        view.sample_ids[order],
        scores[order],
        [reasons[i] for i in order],
        f"outliers: {', '.join(_names(found, source, signals))} ({source} rows)",
        {name: np.asarray(told.scores, np.float64)[order] for name, told in found.items()},
        log.names(),
        log.thumbnails,
        list(together),
        own and own.take(order.tolist()),
    )
    return replace(ranking, regularisation=regularisation_images(log))


def _in_sum(i: int, counted: Mapping[str, Found]) -> Reason:
    """Why a sample has a high score although none of its signals alone is far out."""
    shares = {
        SIGNALS[name].title: float((told.scores >= told.scores[i]).mean()) for name, told in counted.items()
    }
    listed = ", ".join(
        f"{title} in the highest {share:.1%}" for title, share in shares.items() if share < 0.2
    )
    return Reason(f"unusual in sum: {listed}", "unusual in sum", "unusual in sum")


def _counted(
    found: Mapping[str, Found], source: str, signals: Sequence[str] | None
) -> list[npt.NDArray[np.float64]]:
    names = _names(found, source, signals)
    if not names:
        asked = "" if signals is None else f" from {', '.join(signals)}"
        able = ", ".join(signal.name for signal in SIGNALS.values() if signal.ranks)
        raise ConfigurationError(f"nothing to rank by{asked}: expected one of {able}")
    return [np.asarray(found[name].scores, np.float64) for name in names]


def _names(found: Mapping[str, Found], source: str, signals: Sequence[str] | None) -> list[str]:
    """Of the signals that the score is made of."""
    if signals is not None:
        return [name for name in found if SIGNALS[name].ranks]
    return [name for name in found if source in SIGNALS[name].counted_on]


def _signals(view: View, names: Sequence[str] | None) -> list[Signal]:
    """The signals asked for, or all that the table can serve."""
    if isinstance(names, str):
        raise ConfigurationError(f"signals is {names!r}; expected a sequence, such as [{names!r}]")
    if names is None:
        able = [s for s in SIGNALS.values() if view.table.dim or not s.projected]
        return [s for s in able if not s.pairwise or len(view.sample_ids) <= PAIRWISE]
    unknown = [name for name in names if name not in SIGNALS]
    if unknown:
        known = ", ".join(SIGNALS)
        raise ConfigurationError(
            f"no outlier part {unknown[0]!r}; there are {known}.{guess(unknown[0], SIGNALS)}"
        )
    return [SIGNALS[name] for name in names]
