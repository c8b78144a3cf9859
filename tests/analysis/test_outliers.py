"""Which samples are unlike the others, why, and what one does with the list."""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import diffhook
from diffhook.analysis import Ranking
from diffhook.analysis.execution import Execution
from diffhook.analysis.fisher import combined, log10_tail
from diffhook.analysis.standardize import Standard, looked_at, robust_deviations, stand_out
from diffhook.errors import ConfigurationError
from diffhook.images import png
from diffhook.log import LogWriter, Snapshot
from diffhook.log.samples import name_id
from tests.analysis.synthetic import config
from tests.report.logs import write_log
from tests.runs import identified, train

DIM, COUNT, LOUD, LOSSY, TWIN, BROKEN = 32, 60, 7, 11, 13, 17


def made_log(
    path: Path, dim: int = DIM, images: Mapping[int, np.ndarray] | None = None, grid: bool = False
) -> diffhook.RunLog:
    """LOUD has large norms on all visits, LOSSY large losses, TWIN the gradients of 12, BROKEN a NaN.

    With ``grid``, the rows are there as probes too.
    """
    described = config()
    described["identity"]["projection"] = {"dim": dim, "seed": 0, "kind": "full" if dim else "none"}
    rng = np.random.default_rng(0)
    writer = LogWriter(path, described)
    for step in range(12):
        sample = rng.permutation(COUNT)
        timestep = rng.integers(1, 1000, COUNT)
        norm = np.exp(rng.normal(0, 0.3, COUNT)) * (1 + timestep / 50)
        loss = np.exp(rng.normal(0, 0.3, COUNT)) / (1 + timestep / 50)
        norm[sample == LOUD] *= 8
        loss[sample == LOSSY] *= 8
        norm[(sample == BROKEN) & (step == 3)] = np.nan
        unit = np.stack([_direction(int(s), rng, dim) for s in sample])
        rows = {
            "sample": sample.astype(np.int64),
            "step": np.full(COUNT, step, np.int64),
            "timestep": timestep.astype(np.float32),
            "noise_seed": np.full(COUNT, -1, np.int64),
            "lr": np.full(COUNT, 0.1, np.float32),
            "loss": loss.astype(np.float32),
            "weight": np.full(COUNT, 0.25, np.float32),
            "grad_norm": norm.astype(np.float32),
        }
        for table in ("train", "probe") if grid else ("train",):
            writer.put(table, {**rows, "projection": unit.astype(np.float32)} if dim else rows)
    for sample, image in (images or {}).items():
        writer.thumbnail(sample, png(image, 8))
    writer.snapshot(Snapshot(6, 0.1, 0.6, writer.session), b"")
    writer.close()
    return diffhook.open_log(path)


def _direction(sample: int, rng: np.random.Generator, dim: int) -> np.ndarray:
    own = np.random.default_rng(12 if sample == TWIN else sample).standard_normal(dim or 1)
    mixed = own + 0.2 * rng.standard_normal(dim or 1)
    return mixed / np.linalg.norm(mixed)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> diffhook.RunLog:
    return made_log(tmp_path_factory.mktemp("outliers") / "log")


def flags_of(ranking: Ranking, sample: int) -> str:
    return "; ".join(ranking.reasons[ranking.sample_ids.tolist().index(sample)])


def test_planted_samples_come_first_with_their_reasons(log: diffhook.RunLog) -> None:
    ranking = diffhook.outliers(log)
    assert ranking.sample_ids[0] == BROKEN
    assert np.isinf(ranking.scores[0])
    assert set(ranking.sample_ids[1:3]) == {LOUD, LOSSY}
    assert "gradient not finite on 1 of 12 visits" in flags_of(ranking, BROKEN)
    assert "deviations above its timesteps' usual" in flags_of(ranking, LOUD)
    assert "repeated: among the highest tenth of norms on 12 of 12 visits" in flags_of(ranking, LOUD)
    assert "moves the model by itself" in flags_of(ranking, LOUD)
    assert "loss far above its timestep's on" in flags_of(ranking, LOSSY)
    assert "same picture" not in flags_of(ranking, TWIN), "events cannot tell"
    assert TWIN not in ranking.sample_ids[:8], "what occurs twice is no outlier for that"


@pytest.mark.parametrize("shade", [0.01, 1.0, None])
def test_a_near_duplicate_is_one_on_the_grid_and_in_pixels(tmp_path: Path, shade: float | None) -> None:
    rng = np.random.default_rng(0)
    first, second = rng.random((2, 8, 8))
    images = {} if shade is None else {12: first, TWIN: (1 - shade) * first + shade * second}
    log = made_log(tmp_path / "log", images=images, grid=True)
    flags = {sample: flags_of(diffhook.outliers(log, "probe"), sample) for sample in range(COUNT)}
    told = {sample for sample in flags if "nearly the same picture" in flags[sample]}
    assert told == ({12, TWIN} if shade == 0.01 else set())
    if told:
        assert "nearly the same picture as 12 (correlation of pixels 1.00)" in flags[TWIN]
    events = diffhook.outliers(log, "train")
    assert not any("same picture" in flag for flags in events.reasons for flag in flags)


def test_parts_say_what_the_score_is_made_of(log: diffhook.RunLog) -> None:
    ranking = diffhook.outliers(log)
    assert set(ranking.signals) == {"norm", "repeat", "loss", "tracin", "retrac", "duplicate"}
    expected = np.zeros(COUNT)
    for part in (ranking.signals["norm"], ranking.signals["loss"]):  # the others stand beside the score
        start, upper = np.quantile(part, [0.5, 0.8])
        scale = (upper - start) / np.log(0.5 / 0.2)
        for i, value in enumerate(part):
            if value > start:
                chance = 0.5 * np.exp(-(value - start) / scale)
            else:
                chance = np.mean([other >= value for other in part])
            expected[i] -= np.log10(chance)
    finite = np.isfinite(ranking.scores)
    np.testing.assert_allclose(ranking.scores[finite], expected[finite], rtol=1e-6)
    assert ranking.title == "outliers: loss, norm (train rows)"


def test_a_part_that_knows_nothing_of_a_sample_does_not_move_it() -> None:
    one, other = np.arange(20.0), np.full(20, np.nan)
    np.testing.assert_array_equal(combined([one, other]), combined([one]))
    assert combined([one])[-1] > 0.9, "the highest of twenty"
    assert (np.diff(combined([one])) > 0).all()


def test_what_is_planted_does_not_stretch_the_tail_that_it_is_in() -> None:
    rng = np.random.default_rng(0)
    clean, planted = rng.normal(size=1000), rng.normal(size=1000)
    planted[:150] += 50
    assert -log10_tail(planted)[:150].min() > 3 * -log10_tail(clean).min()


def test_of_equal_values_the_few_others_stand_out() -> None:
    values = np.zeros(100)
    values[:5] = [1, 2, 3, 4, 5]
    found = -log10_tail(values)
    assert (found[5:] == 0).all()
    assert (np.diff(found[:5]) > 0).all()
    np.testing.assert_array_equal(log10_tail(np.zeros(9)), 0)


def test_whose_gradient_was_not_finite_first_comes_before_those_that_it_spoiled(tmp_path: Path) -> None:
    """A step on a NaN loses the model: every later gradient is NaN, whoever's it is."""
    data = identified(12)
    data[8, 0, 5, 5] = torch.nan
    train(tmp_path / "log", data=data, epochs=2, projection_dim=16, batch_size=2, alerts=())
    log = diffhook.open_log(tmp_path / "log")
    lost = {int(s) for s in log.train["sample"][~np.isfinite(log.train["grad_norm"])]}
    assert len(lost) > 6, "the NaN must have spread, or the test sees nothing"
    ranking = diffhook.outliers(log)
    assert ranking.sample_ids[0] == 8
    assert ranking.reasons[0][0].endswith("visits: the image itself is not")
    assert np.isinf(ranking.scores[: len(lost)]).all()
    assert "all of them after sample 8's of step" in ranking.reasons[len(lost) - 1][0]


def test_a_single_part_ranks_as_it_does(log: diffhook.RunLog) -> None:
    ranking = diffhook.outliers(log, signals=["loss"])
    assert list(ranking.signals) == ["loss"]
    assert ranking.sample_ids[1] == LOSSY
    assert (np.diff(ranking.signals["loss"][1:]) <= 0).all()


def test_on_a_grid_losses_are_compared_by_their_mean(tmp_path: Path) -> None:
    events = made_log(tmp_path / "log").train
    rows = {name: events[name] for name in events.columns}
    for name, whole in (("grid", True), ("holes", False)):
        described = config()
        described["identity"]["projection"] = {"dim": DIM, "seed": 0, "kind": "full"}
        writer = LogWriter(tmp_path / name, described)
        writer.put("probe", rows if whole else {k: v[1:] for k, v in rows.items()})
        writer.put("train", rows)
        writer.close()
        log = diffhook.open_log(tmp_path / name)
        ranking = diffhook.outliers(log, "probe", ["loss"])
        means = [np.log(rows["loss"][rows["sample"] == i].astype(float).mean()) for i in ranking.sample_ids]
        compared = np.allclose(ranking.signals["loss"], means, rtol=1e-6)
        assert compared == whole, "a sample that lacks some of the grid cannot be compared so"
        assert ranking.sample_ids[1] == LOSSY, "after the one whose gradient is not finite"


def test_norms_alone_serve_without_projections(tmp_path: Path) -> None:
    ranking = diffhook.outliers(made_log(tmp_path / "log", dim=0))
    assert set(ranking.signals) == {"norm", "repeat", "loss"}
    with pytest.raises(ConfigurationError, match="no outlier part 'colour'; there are"):
        diffhook.outliers(made_log(tmp_path / "other"), signals=["colour"])


def test_deviations_are_robust_within_timestep_and_stage(log: diffhook.RunLog) -> None:
    rows = looked_at(log.train, ("loss", "timestep", "step"))
    found = Standard.learn("loss", rows, bins=1).deviations(rows)
    logs = np.log(log.train["loss"].astype(float))
    stages = log.train["step"] * 8 // 12 if len(logs) >= 400 else None
    assert stages is not None
    step = log.train["step"].astype(float)
    edges = np.unique(np.quantile(step, np.linspace(0, 1, 9)))
    cell = np.searchsorted(edges, step, side="right").clip(1, 8) - 1
    for index in np.unique(cell):
        mine = logs[cell == index]
        spread = 1.4826 * np.median(np.abs(mine - np.median(mine)))
        np.testing.assert_allclose(found[cell == index], (mine - np.median(mine)) / spread)
    assert np.isnan(robust_deviations(np.array([np.nan, 1.0, 2.0]))[0])


def test_a_kind_of_samples_does_not_stand_out_from_those_that_are_all_alike() -> None:
    """Most are pictures of one sky, a third of something else: that is no fault of each of the third."""
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(0, 0.01, 60), rng.normal(1, 0.1, 30), [9.0, np.nan]])
    assert (robust_deviations(values)[60:90] > 3).all(), "by these alone they are all far"
    assert np.flatnonzero(stand_out(values, 3.0)).tolist() == [90]
    few = np.concatenate([rng.normal(0, 0.01, 90), np.ones(10)])
    assert np.flatnonzero(stand_out(few, 5.0)).tolist() == list(range(90, 100))
    assert stand_out(rng.normal(size=100_000), 3.0).mean() == pytest.approx(0.00135, rel=0.25)
    assert np.flatnonzero(stand_out(np.array([0.0] * 19 + [1.0]), 3.0)).tolist() == [19]


def test_a_long_table_is_read_by_shards_and_its_usual_values_learned_from_evenly_spaced_rows(
    log: diffhook.RunLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffhook.analysis import standardize
    from diffhook.log import Table

    whole, diagnosed = diffhook.outliers(log), diffhook.bias(log)

    def refuse(self: Table, column: str) -> Any:
        raise AssertionError(f"all of {column} was held")

    monkeypatch.setattr(Table, "__getitem__", refuse)
    assert (diffhook.outliers(log).scores == whole.scores).all()
    assert diffhook.bias(log) == diagnosed
    monkeypatch.setattr(standardize, "LOOKED_AT", 300)
    some = looked_at(log.train, ("sample", "step"))
    monkeypatch.undo()
    assert (some["step"] == log.train["step"][::3]).all(), "720 rows, every third"
    monkeypatch.setattr(standardize, "LOOKED_AT", 300)
    assert set(diffhook.outliers(log).sample_ids[:3]) == {BROKEN, LOUD, LOSSY}


def test_near_duplicates_are_the_nearest_of_all_pairs(log: diffhook.RunLog, monkeypatch: Any) -> None:
    from diffhook.analysis import duplicates

    monkeypatch.setattr(duplicates, "_TILE", 16)  # several tiles
    table = log.train
    sums = np.zeros((COUNT, DIM))
    usable = np.isfinite(table["grad_norm"])
    np.add.at(sums, table["sample"][usable], table["projection"][usable].astype(float))
    units = sums / np.linalg.norm(sums, axis=1, keepdims=True)
    cosines = units @ units.T
    np.fill_diagonal(cosines, -1)
    for memory in (1 << 30, 1 << 12):
        found = diffhook.near_duplicates(log, "train", execution=Execution(memory=memory))
        assert (found.neighbours == cosines.argmax(1)).all()
        np.testing.assert_allclose(found.cosines, cosines.max(1), rtol=1e-5)
    assert found.neighbours[TWIN] == 12
    assert found.cosines[TWIN] > 0.95


@pytest.mark.parametrize("all_pairs", [20_000, 10], ids=["all pairs", "inverted lists"])
def test_faiss_finds_the_neighbours_that_comparing_all_pairs_finds(
    log: diffhook.RunLog, monkeypatch: pytest.MonkeyPatch, all_pairs: int
) -> None:
    from diffhook.analysis import inverted_lists

    monkeypatch.setattr(inverted_lists, "ALL_PAIRS", all_pairs)  # 7 lists of 60 samples, all looked through
    monkeypatch.setattr(inverted_lists, "_BATCH", 16)
    exact, found = (diffhook.near_duplicates(log, "train", index=index) for index in ("exact", "faiss"))
    assert (found.neighbours == exact.neighbours).all()
    np.testing.assert_allclose(found.cosines, exact.cosines, rtol=1e-5)


def test_samples_without_a_direction_have_no_neighbour() -> None:
    from diffhook.analysis.inverted_lists import nearest_by_faiss

    units = np.eye(4, 3, dtype=np.float32)  # the last is 0
    units[1] = units[0]
    position, cosines = nearest_by_faiss(units)
    assert position[:2].tolist() == [1, 0]
    np.testing.assert_array_equal(cosines, np.array([1, 1, 0, np.nan], np.float32))


def test_without_faiss_the_extra_is_named(log: diffhook.RunLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'diffhook\[faiss\]'"):
        diffhook.near_duplicates(log, "train", index="faiss")
    with pytest.raises(ConfigurationError, match='index is \'annoy\'; expected "exact" or "faiss"'):
        diffhook.near_duplicates(log, "train", index="annoy")


def test_files_hold_the_ranking(log: diffhook.RunLog, tmp_path: Path) -> None:
    ranking = diffhook.outliers(log)
    ranking.to_csv(tmp_path / "all.csv")
    ranking.to_parquet(tmp_path / "all.parquet")
    ranking.exclude(tmp_path / "first.txt", 3)
    ranking.exclude(tmp_path / "high.txt", threshold=float(ranking.scores[5]))
    with open(tmp_path / "all.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["sample"]) for row in rows] == ranking.sample_ids.tolist()
    np.testing.assert_allclose([float(row["norm"]) for row in rows], ranking.signals["norm"])
    frame = pandas.read_parquet(tmp_path / "all.parquet")
    assert frame["sample"].tolist() == ranking.sample_ids.tolist()
    assert (tmp_path / "first.txt").read_text().split() == [str(i) for i in ranking.sample_ids[:3]]
    assert len((tmp_path / "high.txt").read_text().split()) == 5


def test_datasets_and_samplers_leave_the_outliers_out(log: diffhook.RunLog) -> None:
    ranking = diffhook.outliers(log)
    dataset = TensorDataset(torch.arange(COUNT))
    left = sorted(set(range(COUNT)) - set(ranking.sample_ids[:4].tolist()))
    assert [int(sample) for (sample,) in ranking.keep(dataset, 4)] == left
    loader = DataLoader(dataset, batch_size=8, sampler=ranking.sampler(dataset, 4, seed=1))
    epochs = [torch.cat([batch for (batch,) in loader]).tolist() for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == left
    assert epochs[0] != epochs[1], "every epoch has an order of its own"
    assert [int(i) for i in ranking.sampler(dataset, 4, shuffle=False)] == left
    assert len(ranking.sampler(dataset, 4)) == COUNT - 4


def test_samples_with_names_are_left_out_by_them(log: diffhook.RunLog, tmp_path: Path) -> None:
    plain = diffhook.outliers(log)
    files = [f"cat/{index}.png" for index in range(COUNT)]
    ids = np.array([name_id(name) for name in files])
    ranking = replace(
        plain, sample_ids=ids[plain.sample_ids], names={name_id(name): name for name in files[1:]}
    )
    first = [files[index] for index in plain.sample_ids[:4]]
    ranking.exclude(tmp_path / "exclude.txt", 4)
    assert (tmp_path / "exclude.txt").read_text().splitlines() == first
    unnamed = ranking.sample_ids.tolist().index(ids[0]) + 1
    ranking.exclude(tmp_path / "more.txt", unnamed)
    assert (tmp_path / "more.txt").read_text().splitlines()[-1] == str(ids[0]), "an id where there is no name"

    dataset = TensorDataset(torch.arange(COUNT))
    left = sorted(set(range(COUNT)) - set(plain.sample_ids[:4].tolist()))
    assert [int(sample) for (sample,) in ranking.keep(dataset, 4, names=files)] == left
    assert [int(sample) for (sample,) in ranking.keep(dataset, 4, names=ids.tolist())] == left
    assert list(ranking.sampler(dataset, 4, names=files, shuffle=False)) == left
    with pytest.raises(ConfigurationError, match=rf"excludes sample {first[0]}, and .*: pass names="):
        ranking.keep(dataset, 4)
    with pytest.raises(ConfigurationError, match=r"not among the names of the dataset, such as 'x0'"):
        ranking.sampler(dataset, 4, names=[f"x{index}" for index in range(COUNT)])
    with pytest.raises(ConfigurationError, match="there are 59 names for a dataset of 60 samples"):
        ranking.keep(dataset, 4, names=files[1:])

    ranking.to_csv(tmp_path / "all.csv")
    ranking.to_parquet(tmp_path / "all.parquet")
    with open(tmp_path / "all.csv") as file:
        assert [row["name"] for row in csv.DictReader(file)][:4] == first
    assert pandas.read_parquet(tmp_path / "all.parquet")["name"].tolist()[:4] == first


def test_rankings_know_the_names_that_the_log_has(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", 16, 1, names=[f"{index}.png" for index in range(16)])
    for ranking in (diffhook.outliers(log), diffhook.self_influence(log)):
        assert ranking.names == log.names()
        assert {ranking.named(sample) for sample in ranking.sample_ids} == set(log.names().values())


def test_what_to_exclude_must_be_said_once(log: diffhook.RunLog) -> None:
    ranking = diffhook.outliers(log)
    with pytest.raises(ConfigurationError, match="expected exactly one of them"):
        ranking.excluded()
    with pytest.raises(ConfigurationError, match="expected exactly one of them"):
        ranking.excluded(3, threshold=1.0)
    with pytest.raises(ConfigurationError, match="but the dataset has 5 samples"):
        ranking.keep(TensorDataset(torch.arange(5)), 30)


def test_self_influence_is_tracins_or_retracs(log: diffhook.RunLog) -> None:
    with pytest.raises(ConfigurationError, match="of tracin or retrac, not of 'trak'"):
        diffhook.self_influence(log, "trak")
