"""Copies among pictures: the very same, those nearer to each other than to any third, and nothing else."""

from __future__ import annotations

import io
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from diffhook.analysis import Ranking
from diffhook.analysis.copies import find_copies
from diffhook.analysis.reason import Reason
from diffhook.report.groups import copy_groups

SIDE = 24


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def exported(pixels: np.ndarray) -> np.ndarray:
    """The same picture, saved as a JPEG in between."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=60)
    return np.asarray(Image.open(buffer))


def pictures(count: int) -> list[np.ndarray]:
    """A coarse pattern each."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (count, 4, 4, 3), np.uint8)
    return [np.kron(each, np.ones((6, 6, 1), np.uint8)) for each in coarse]


def every_pair(count: int) -> np.ndarray:
    return np.array(list(combinations(range(count), 2)))


@pytest.fixture
def collection() -> list[np.ndarray]:
    """Six pictures; 6 is 0 again, 7 nearly 1; 8, 9 and 10 a series with 2, each as near to the next."""
    first = pictures(6)
    series = [(first[2] * shade).astype(np.uint8) for shade in (0.95, 0.9, 0.85)]
    return [*first, first[0], exported(first[1]), *series]


def test_copies_are_told_from_a_series(collection: list[np.ndarray]) -> None:
    ids = np.arange(100, 100 + len(collection))
    thumbnails = dict(zip(ids.tolist(), map(png, collection), strict=True))
    found = find_copies(ids, every_pair(len(ids)), thumbnails)
    assert found.exact == {0: (0, 6), 6: (0, 6)}
    assert {i: j for i, (j, _) in found.near.items()} == {1: 7, 7: 1}
    assert all(alike > 0.95 for _, alike in found.near.values())
    assert (found.isolation[[0, 6]] > found.isolation[[1, 7]]).all()
    assert found.isolation[[1, 7]].min() > np.delete(found.isolation, [0, 6, 1, 7]).max()


def test_near_copies_are_sought_only_where_gradients_are_near(collection: list[np.ndarray]) -> None:
    ids = np.arange(len(collection))
    thumbnails = dict(zip(ids.tolist(), map(png, collection), strict=True))
    del thumbnails[6]
    found = find_copies(ids, np.array([[0, 1], [3, 4]]), thumbnails)
    assert (found.exact, found.near) == ({}, {})
    assert np.isnan(found.isolation[6])
    assert np.isfinite(np.delete(found.isolation, 6)).all()
    assert find_copies(ids, np.empty((0, 2), np.intp), thumbnails).near == {}


def test_copies_of_copies_are_one_group_and_the_least_unusual_is_first() -> None:
    def copy(*others: int) -> list[str]:
        return [Reason("…", "near copy", "…", others)]

    flags: list[list[str]] = [copy(13), [], copy(12, 99), copy(10), copy(15), copy(14)]
    ids, scores = np.arange(10, 16), np.arange(6, 0, -1.0)
    ranking = Ranking.sort(ids, scores, flags, "", {"duplicate": np.array([1.0, 0, 1, 1, 2, 2])})
    assert copy_groups(ranking) == [[5, 4], [3, 0]], "12 names itself and one that is not there"
    assert copy_groups(ranking.take(slice(1))) == []
