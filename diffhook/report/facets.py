"""What samples can be told apart by: kinds of reasons, folders or labels, alerts, visits."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from diffhook import words
from diffhook.analysis import Ranking
from diffhook.analysis.class_names import folders as first_folders
from diffhook.analysis.execution import Execution
from diffhook.analysis.reason import KINDS, Reason
from diffhook.analysis.roles import role_of
from diffhook.analysis.signals import View
from diffhook.log import RunLog
from diffhook.log.samples import split_id
from diffhook.report.doubts import TITLE

_NONE = "none"
_MINOR = KINDS[KINDS.index("unusual in sum") :]  # they tell of the training more than of a picture
_LABELS = {"wrong label": TITLE}  # where there is something to compare
_RANGES = 6  # of visits, where their numbers are many
_MOST = 200  # values; the others are one


@dataclass(frozen=True)
class Facet:
    """One way to divide samples.

    Attributes:
        name: a word of its own.
        title: what it is called.
        values: in the order in which they are offered.
        of: for each sample the positions of its values; one or more.
        folded: of how many values, the last, one rarely asks.
        counts: of samples, for each value.
    """

    name: str
    title: str
    values: tuple[str, ...]
    of: tuple[tuple[int, ...], ...]
    folded: int = 0

    @property
    def counts(self) -> list[int]:
        found = Counter(position for each in self.of for position in each)
        return [found[position] for position in range(len(self.values))]

    @classmethod
    def most_common_first(cls, name: str, title: str, of: Iterable[Iterable[str]]) -> Facet:
        """From each sample's values; a sample without any has "none", which comes last."""
        given = [tuple(dict.fromkeys(each)) or (_NONE,) for each in of]
        counts = Counter(value for each in given for value in each)
        none = counts.pop(_NONE, 0)
        values = [value for value, _ in counts.most_common(_MOST)]
        rest = [f"{len(counts) - _MOST:,} others"] if len(counts) > _MOST else []
        values += rest + ([_NONE] if none else [])
        place = {value: i for i, value in enumerate(values)}
        other = place.get(rest[0], 0) if rest else 0
        positions = (tuple(dict.fromkeys(place.get(value, other) for value in each)) for each in given)
        return cls(name, title, tuple(values), tuple(positions))


def facets_of(
    log: RunLog,
    ranking: Ranking,
    labels: Mapping[int, Hashable] | None,
    execution: Execution,
    doubts: Set[int] = frozenset(),
) -> list[Facet]:
    """The facets of a ranking's samples that divide them at all.

    Args:
        doubts: positions of those whose labels are to be compared.
    """
    own = [split_id(int(sample))[0] for sample in ranking.sample_ids]
    found = [reasons(ranking.reasons, doubts), _labels(own, labels), folders(own, ranking.names)]
    found += [roles(ranking), alerts(own, log.alerts()), visits(_seen(log, ranking.sample_ids, execution))]
    return [facet for facet in found if facet is not None and len(facet.values) > 1]


def reasons(given: Sequence[Sequence[str]], doubts: Set[int] = frozenset()) -> Facet:
    """By the kinds of their reasons, in the order in which one acts on them; the minor ones after "none".

    Args:
        doubts: positions of samples whose labels are to be compared: one kind, whether flagged or not.
    """
    kinds_of = [
        list(dict.fromkeys(_LABELS.get(kind, kind) if i in doubts else kind for kind in kinds)) or [_NONE]
        for i, each in enumerate(given)
        for kinds in [[Reason.of(reason).kind for reason in each] + [TITLE] * (i in doubts)]
    ]
    met = {kind for each in kinds_of for kind in each}
    ordered = dict.fromkeys(name for kind in KINDS for name in (kind, _LABELS.get(kind, kind)))
    known = [name for name in ordered if name in met]
    main = [name for name in known if name not in _MINOR]
    minor = [name for name in known if name in _MINOR]
    values = [*main, *sorted(met - {*known, _NONE}), *met & {_NONE}, *minor]
    place = {value: i for i, value in enumerate(values)}
    of = tuple(tuple(place[value] for value in each) for each in kinds_of)
    return Facet("reason", "Reason", tuple(values), of, len(minor))


def _labels(own: Sequence[int], labels: Mapping[int, Hashable] | None) -> Facet | None:
    if not labels:
        return None
    texts = ([words.one_line(str(labels[sample]))] if sample in labels else [] for sample in own)
    return Facet.most_common_first("label", "Label", texts)


def folders(own: Sequence[int], names: Mapping[int, str]) -> Facet | None:
    """By the first folder in which the names differ."""
    if not names:
        return None
    found = first_folders(names)
    parts = (found.get(sample, "") for sample in own)
    return Facet.most_common_first("folder", "Folder", ([part] if part else [] for part in parts))


def roles(ranking: Ranking) -> Facet:
    """By whether they are regularisation images."""
    given = (role_of(int(sample), ranking.regularisation) for sample in ranking.sample_ids)
    return Facet.most_common_first("role", "Role", ([role] for role in given))


def alerts(own: Sequence[int], raised: Sequence[Mapping[str, Any]]) -> Facet:
    """By the kinds of the alerts that name them."""
    kinds: defaultdict[int, list[str]] = defaultdict(list)
    for alert in raised:
        for sample in alert.get("samples", []):
            kinds[split_id(int(sample))[0]].append(str(alert["kind"]))
    return Facet.most_common_first("alert", "Alert", (kinds.get(sample, []) for sample in own))


def visits(seen: npt.NDArray[np.integer[Any]]) -> Facet:
    """By how many rows of the training each has; in ranges where the numbers are many."""
    numbers = np.unique(seen)
    if len(numbers) > _RANGES:
        edges = np.unique(np.quantile(seen, np.linspace(0, 1, _RANGES + 1), method="lower"))
        edges = edges if len(edges) > 1 else numbers[[0, -1]]
        position = np.searchsorted(edges, seen, side="right").clip(1, len(edges) - 1) - 1
        last = [*(edges[1:-1] - 1), edges[-1]]
        texts = [_range(int(low), int(high)) for low, high in zip(edges[:-1], last, strict=True)]
    else:
        position = np.searchsorted(numbers, seen)
        texts = [_range(int(number), int(number)) for number in numbers]
    return Facet("visits", "Visits captured", tuple(texts), tuple((int(each),) for each in position))


def _range(low: int, high: int) -> str:
    if low == high:
        return f"{low:,}" if low else "never"
    return f"{low:,} – {high:,}"


def _seen(log: RunLog, ids: npt.NDArray[np.int64], execution: Execution) -> npt.NDArray[np.integer[Any]]:
    """(N,) rows of the training, in the order of the ids."""
    if not len(log.train):
        return np.zeros(len(ids), np.int64)
    view = View(log, "train", log.train, execution)
    counts = view.means(log.train, "step")[1].astype(np.int64)
    found = np.searchsorted(view.sample_ids, ids).clip(0, len(view.sample_ids) - 1)
    return np.where(view.sample_ids[found] == ids, counts[found], 0)
