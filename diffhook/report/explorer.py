"""All samples of a ranking as the page's scripts have them: where they lie and what divides them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count, product
from typing import Any

import numpy as np
import numpy.typing as npt

from diffhook import words
from diffhook.analysis import Ranking
from diffhook.analysis.execution import Execution
from diffhook.analysis.reason import Reason
from diffhook.analysis.sample_map import SampleMap, sample_map
from diffhook.analysis.tables import source_table
from diffhook.console import progress_bar
from diffhook.errors import ConfigurationError, LogError
from diffhook.log import RunLog
from diffhook.log.samples import sample_words, short_names, split_id
from diffhook.report.atlas import Atlas, make_atlas, small_pictures
from diffhook.report.doubts import Doubts, find_doubts
from diffhook.report.facets import Facet, facets_of
from diffhook.report.groups import COPIES, CopyGroup, compared_groups
from diffhook.report.likeness import Images
from diffhook.report.nearness import Nearest

MOST = 20_000  # samples that a page carries
_STEPS = 10_000  # of a position along either side of the map
_BOTTOM = 0.97  # where samples without a gradient stand in line


@dataclass(frozen=True)
class Explorer:
    """What the page's map and facets know of the first samples of a ranking, in its order.

    Attributes:
        ranking: those samples.
        facets: what divides them.
        places: (N, 2) positions on the map in [0, 1], y downwards; None where the log has no projections.
        shares: of the variance, which the map's two axes have.
        homeless: how many have no usable gradient, and stand at the map's lower edge.
        atlas: their pictures; None where there are none.
        doubts: their labels to compare; None where there are none.
        groups: copies.
    """

    ranking: Ranking
    facets: list[Facet]
    places: npt.NDArray[np.float64] | None
    shares: tuple[float, float]
    homeless: int
    atlas: Atlas | None
    doubts: Doubts | None
    groups: list[CopyGroup]

    @classmethod
    def make(
        cls,
        log: RunLog,
        ranking: Ranking,
        images: Images | None,
        source: str,
        labels: Mapping[int, Hashable] | None,
        execution: Execution,
    ) -> Explorer:
        """Of the first :data:`MOST` samples of a ranking.

        Args:
            source: rows by whose gradients samples are placed.
            labels: sample id → label, where they are known.
        """
        ranking = ranking.take(slice(MOST))
        with progress_bar(execution.progress) as bar:
            samples = bar.track(ranking.sample_ids.tolist(), description="pictures of the map")
            pictures = small_pictures(images, samples)
        doubts = find_doubts(ranking, Nearest(pictures, ranking.sample_ids))
        facets = facets_of(log, ranking, labels, execution, set() if doubts is None else {*doubts.positions})
        found = _map(log, source, ranking.sample_ids, execution)
        places, homeless = None, 0
        if found is not None:
            places, homeless = _places(found, ranking.sample_ids)
        shares = (0.0, 0.0) if found is None else found.shares
        groups = compared_groups(ranking, pictures)
        return cls(ranking, facets, places, shares, homeless, make_atlas(pictures), doubts, groups)

    def data(self) -> dict[str, Any]:
        """Columns, each with a value for every sample, as JSON has them."""
        short, own = short_names(self.ranking.names), [split_id(int(s))[0] for s in self.ranking.sample_ids]
        atlas = self.atlas
        return {
            "ids": own,
            "named": bool(self.ranking.names),
            "names": [sample_words(int(sample), short) for sample in self.ranking.sample_ids],
            "listed": [self.ranking.named(sample) for sample in own] if self.ranking.names else own,
            "scores": [words.number(float(score)) for score in self.ranking.scores],
            "keys": [[_key(float(value)) for value in values] for values in self.ranking.signals.values()],
            "reasons": {
                str(i): [[reason.brief, str(reason)] for reason in map(Reason.of, given)]
                for i, given in enumerate(self.ranking.reasons)
                if given
            },
            "chips": [len(Reason.telling(given)) for given in self.ranking.reasons],
            "groups": [group.members for group in self.groups],
            "copies": COPIES,
            "closeness": [group.closeness for group in self.groups],
            "variants": [group.variant for group in self.groups],
            "doubts": self.doubts and self.doubts.data(),
            "facets": [{"name": facet.name, "values": facet.values, "of": facet.of} for facet in self.facets],
            "places": None if self.places is None else _apart((self.places * _STEPS).round().astype(int)),
            "atlas": None if atlas is None else {"cell": atlas.cell, "columns": atlas.columns},
            "cells": [] if atlas is None else [atlas.places.get(int(s), -1) for s in self.ranking.sample_ids],
        }


def _map(log: RunLog, source: str, ids: npt.NDArray[np.int64], execution: Execution) -> SampleMap | None:
    try:
        table = source_table(log, source)
    except (LogError, ConfigurationError):  # norms only, or sums of rows
        return None
    found = sample_map(table, execution, ids)
    return found if len(found.sample_ids) else None


def _places(found: SampleMap, ids: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.float64], int]:
    """(N, 2) in [0, 1], and how many stand at the lower edge for want of a gradient."""
    at = np.searchsorted(found.sample_ids, ids).clip(0, len(found.sample_ids) - 1)
    known = found.sample_ids[at] == ids  # a ranking may be of other rows
    raw = np.where(known[:, None], found.positions[at], np.nan)
    homeless = np.isnan(raw[:, 0])
    places = np.column_stack([_spread(column, homeless) for column in (raw[:, 0], -raw[:, 1])])
    if homeless.any():
        places[:, 1] *= _BOTTOM - 0.05
        places[homeless] = np.column_stack([np.linspace(0, 1, homeless.sum() + 2)[1:-1],
                                            np.full(homeless.sum(), _BOTTOM)])  # fmt: skip
    return places, int(homeless.sum())


def _spread(values: npt.NDArray[np.float64], homeless: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """Along one side of the map: an outlier far out leaves the others their room."""
    known = values[~homeless]
    if not len(known):
        return np.full(len(values), 0.5)
    middle = np.median(known)
    scale = np.quantile(np.abs(known - middle), 0.75) or 1.0
    bent = np.arcsinh((values - middle) / scale)
    low, high = np.nanmin(bent), np.nanmax(bent)
    return np.asarray((bent - low) / ((high - low) or 1.0))


def _apart(places: npt.NDArray[np.int_]) -> list[list[int]]:
    """Columns of places of which no two are the same: copies lie side by side, and zooming in parts them."""
    taken: dict[tuple[int, int], None] = {}  # in the order of the samples
    around: defaultdict[tuple[int, int], Iterator[tuple[int, int]]] = defaultdict(_outwards)
    for x, y in places.tolist():
        free = ((x + right, y + down) for right, down in around[x, y])
        taken[next(place for place in free if place not in taken)] = None
    return [list(side) for side in zip(*taken, strict=True)]


def _outwards() -> Iterator[tuple[int, int]]:
    """All points, those of the nearer squares around (0, 0) first."""
    for far in count():
        square = range(-far, far + 1)
        yield from (point for point in product(square, square) if max(map(abs, point)) == far)


def _key(value: float) -> float | None:
    """To sort by, ascending: the largest value first; None where nothing is known."""
    if math.isnan(value):
        return None
    return float(f"{-value:.5g}") if math.isfinite(value) else math.copysign(1e300, -value)
