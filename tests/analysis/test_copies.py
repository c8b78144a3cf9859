"""Copies among pictures: the very same, those nearer to each other than to any third, and nothing else."""

from __future__ import annotations

import io
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import diffhook
from diffhook.analysis import Ranking
from diffhook.analysis.copies import find_copies
from diffhook.analysis.reason import Reason
from diffhook.log import LogWriter
from diffhook.report.groups import copy_groups
from tests.analysis.synthetic import config

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


COUNT, DIM = 40, 16
Change = Callable[[dict[str, np.ndarray]], None]


def probed(
    path: Path, twins: dict[int, int], dim: int = DIM, times: int = 4, change: Change = lambda rows: None
) -> diffhook.RunLog:
    """A grid of all samples; twins have their originals' rows, but for rounding."""
    described = config()
    described["identity"]["projection"] = {"dim": dim, "seed": 0, "kind": "full" if dim else "none"}
    rng = np.random.default_rng(0)
    rows: dict[str, list[np.ndarray]] = {}
    for time in range(times):
        unit = rng.standard_normal((COUNT, max(dim, 1)))
        unit *= 0.98 / np.linalg.norm(unit, axis=1, keepdims=True)  # of a sketch: near 1
        norm, loss = np.exp(rng.normal(0, 0.3, (2, COUNT)))
        for twin, original in twins.items():
            unit[twin], rounding = unit[original], 1 + 1e-6 * (-1) ** time
            norm[twin], loss[twin] = norm[original] * rounding, loss[original] / rounding
        made = {
            "sample": np.arange(COUNT), "step": np.zeros(COUNT, int),
            "timestep": np.full(COUNT, time * 100.0),
            "noise_seed": np.full(COUNT, time), "lr": np.full(COUNT, 0.1), "loss": loss, "grad_norm": norm,
            "weight": np.full(COUNT, 1 / COUNT),
        }  # fmt: skip
        for name, values in (made | ({"projection": unit} if dim else {})).items():
            rows.setdefault(name, []).append(values)
    table = {name: np.concatenate(values) for name, values in rows.items()}
    change(table)
    writer = LogWriter(path, described)
    for kind in ("train", "probe"):
        writer.put(kind, {**table, "noise_seed": np.full(COUNT * times, -1)} if kind == "train" else table)
    writer.close()
    return diffhook.open_log(path)


def copies_of(ranking: Ranking) -> dict[int, set[int]]:
    return {
        int(sample): set(reason.others)
        for sample, flags in zip(ranking.sample_ids, ranking.reasons, strict=True)
        for reason in map(Reason.of, flags)
        if reason.kind == "exact copy"
    }


@pytest.mark.parametrize("source", ["train", "probe"])
@pytest.mark.parametrize(("dim", "times"), [(DIM, 4), (DIM, 1), (0, 4)])
def test_equal_gradients_on_a_grid_are_exact_copies(
    source: str, dim: int, times: int, tmp_path: Path
) -> None:
    log = probed(tmp_path / "log", {7: 3, 9: 3, 11: 3, 20: 30}, dim, times)
    ranking = diffhook.outliers(log, source)
    told = copies_of(ranking)
    assert told == {3: {7, 9, 11}, 7: {3, 9, 11}, 9: {3, 7, 11}, 11: {3, 7, 9}, 20: {30}, 30: {20}}
    assert "the same gradients as 30" in ranking.reasons[ranking.sample_ids.tolist().index(20)]
    groups = [{int(ranking.sample_ids[i]) for i in group} for group in copy_groups(ranking)]
    assert sorted(groups, key=len) == [{20, 30}, {3, 7, 9, 11}]


def nearly(rows: dict[str, np.ndarray]) -> None:
    """As a picture that was saved again: one part in a thousand."""
    rows["grad_norm"][rows["sample"] == 7] *= 1.001


def elsewhere(rows: dict[str, np.ndarray]) -> None:
    """Another direction of the same length and loss."""
    rows["projection"][rows["sample"] == 7] *= -1


def at_one_timestep(rows: dict[str, np.ndarray]) -> None:
    rows["loss"][(rows["sample"] == 7) & (rows["timestep"] == 200)] *= 1.01


def of_zeros(rows: dict[str, np.ndarray]) -> None:
    """A last layer of zeros: all gradients are of the noise alone."""
    for name in ("grad_norm", "loss", "projection"):
        rows[name][:] = rows[name][0]


@pytest.mark.parametrize("change", [nearly, elsewhere, at_one_timestep, of_zeros])
def test_what_only_looks_like_a_copy_is_not_told(change: Change, tmp_path: Path) -> None:
    log = probed(tmp_path / "log", {7: 3}, change=change)
    assert copies_of(diffhook.outliers(log)) == {}


def test_norm_and_loss_at_one_timestep_are_no_proof(tmp_path: Path) -> None:
    log = probed(tmp_path / "log", {7: 3}, 0, 1)
    assert copies_of(diffhook.outliers(log)) == {}
