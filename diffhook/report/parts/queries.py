"""What made these images: each query beside its strongest proponents and opponents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from diffhook import words
from diffhook.analysis import Scores
from diffhook.analysis.methods import title_of
from diffhook.report.rendering import Part, part
from diffhook.report.thumbnails import PictureCache, Thumbnail

_LEVELS = 5  # shades of the heat strip


@dataclass(frozen=True)
class Influence:
    """One sample's influence on one query."""

    sample: int
    picture: Thumbnail | None
    score: str  # in the unit of its query and method
    error: str
    beyond: bool  # noise, as far as that is known
    bar: tuple[float, float, float]  # |score|, and the ends of its error bar; 1 is the longest
    strip: Sequence[int]  # per timestep bin −5 … 5
    strip_words: str


@dataclass(frozen=True)
class Answer:
    """What one method says of one query.

    Attributes:
        proponents: of the highest scores, those that are positive beyond their error.
        opponents: of the lowest, those that are negative beyond it.
        most, least: the highest and the lowest, where none of them is.
    """

    method: str
    unit: str
    proponents: list[Influence]
    opponents: list[Influence]
    most: list[Influence]
    least: list[Influence]


@dataclass(frozen=True)
class Query:
    number: int
    picture: Thumbnail | None
    answers: list[Answer]


@dataclass(frozen=True)
class TimestepShares:
    """Where along the timesteps the influence of some samples came from.

    Attributes:
        values: (Q, k, bins).
        edges: (bins + 1,).
    """

    values: npt.NDArray[np.floating[Any]]
    edges: npt.NDArray[np.floating[Any]]


def queries_part(
    name: str,
    scores: Sequence[Scores],
    thumbnails: PictureCache,
    query_thumbnails: PictureCache,
    *,
    k: int = 8,
    queries: int | None = None,
    timesteps: Sequence[TimestepShares | None] = (),
) -> Part | None:
    """A query set under each of ``scores``.

    Args:
        scores: one a method, over the same queries.
        queries: only the first so many.
        timesteps: one a method, for the samples that :func:`shown` names; None where not known.
    """
    if not scores or not len(scores[0].query_ids):
        return None
    over = list(timesteps) or [None] * len(scores)
    answers = [_answers(each, thumbnails, k, when) for each, when in zip(scores, over, strict=True)]
    asked = [
        Query(int(number), query_thumbnails(int(number)), [of[row] for of in answers])
        for row, number in enumerate(scores[0].query_ids[:queries])
    ]
    edges = next((words.apart(when.edges) for when in over if when is not None), None)
    return part(
        "queries",
        f"What made these images: {name}" if name else "What made these images",
        f"What made: {name}",
        name=name,
        k=k,
        names=scores[0].names,
        queries=asked,
        total=len(scores[0].query_ids),
        methods=[title_of(each.method) for each in scores],
        span=None if edges is None else (edges[0], edges[-1]),
        errors=any(each.errors is not None for each in scores),
    )


def shown(scores: Scores, k: int) -> npt.NDArray[np.int64]:
    """(Q, 2k) ids: the top k proponents, then the top k opponents."""
    return np.concatenate([scores.top(k).sample_ids, scores.top(k, opponents=True).sample_ids], axis=1)


def _answers(scores: Scores, thumbnails: PictureCache, k: int, when: TimestepShares | None) -> list[Answer]:
    ids = shown(scores, k)
    columns = np.searchsorted(scores.sample_ids, ids)
    values = np.take_along_axis(scores.values, columns, 1).astype(np.float64)
    errors, margins = (
        np.full(values.shape, unknown) if known is None else np.take_along_axis(known, columns, 1)
        for known, unknown in ((scores.errors, np.nan), (scores.margins, 0.0))
    )
    found = []
    for row in range(len(ids)):
        exponent = _exponent(values[row])
        longest = float(np.max(np.abs(values[row]) + np.nan_to_num(errors[row]), initial=0)) or 1.0
        influences = [
            Influence(
                int(ids[row, column]),
                thumbnails(int(ids[row, column])),
                f"{values[row, column] / 10**exponent:+.2f}".replace("-", "−"),
                "" if math.isnan(errors[row, column]) else f"{errors[row, column] / 10**exponent:.2f}",
                bool(abs(values[row, column]) > margins[row, column]),
                _bar(float(values[row, column]), float(errors[row, column]), longest),
                *_strip(when, row, column),
            )
            for column in range(ids.shape[1])
        ]
        half = ids.shape[1] // 2
        unit = words.power(exponent) if exponent else "1"
        pro, con = (
            [one for one, value in zip(part, signed, strict=True) if value > 0 and one.beyond]
            for part, signed in (
                (influences[:half], values[row, :half]),
                (influences[half:], -values[row, half:]),
            )
        )
        most, least = ([] if pro else influences[:half]), ([] if con else influences[half:])
        found.append(Answer(title_of(scores.method), unit, pro, con, most, least))
    return found


def _exponent(values: npt.NDArray[np.float64]) -> int:
    largest = float(np.max(np.abs(values), initial=0))
    return math.floor(math.log10(largest)) if largest > 0 and math.isfinite(largest) else 0


def _bar(value: float, error: float, longest: float) -> tuple[float, float, float]:
    spread = 0.0 if math.isnan(error) else error
    length = abs(value)
    return length / longest, max(length - spread, 0) / longest, (length + spread) / longest


def _strip(when: TimestepShares | None, row: int, column: int) -> tuple[list[int], str]:
    """Shades, and the same in words."""
    if when is None:
        return [], ""
    carried = np.nan_to_num(when.values[row, column].astype(np.float64))
    largest = np.abs(carried).max(initial=0)
    if not largest:
        return [0] * len(carried), "no timestep carried it"
    shades = np.sign(carried) * np.ceil(np.abs(carried) / largest * _LEVELS - 1e-9)
    peak = int(np.abs(carried).argmax())
    low, high = words.apart(when.edges)[peak : peak + 2]
    return shades.astype(int).tolist(), f"most of it at timesteps {low} to {high}"
