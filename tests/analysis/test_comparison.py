"""Two runs side by side: the same samples are compared, whatever they are called, and only those."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import diffhook
from diffhook.appearance import COLUMNS
from diffhook.errors import ConfigurationError
from diffhook.log import LogWriter, RunLog, open_log
from diffhook.log.samples import name_id
from tests.analysis.synthetic import sketched

SAMPLES, VISITS, DIM = 120, 8, 8
LEFT_OUT = [3, 50, 51]
CONFIG = sketched(DIM)


def _log(
    path: Path,
    samples: list[int],
    *,
    loss: float = 1.0,
    names: bool = False,
    renumbered: bool = False,
    looks: bool = True,
    loud: int | None = None,
) -> RunLog:
    """A run on some of the samples; each has looks of its own and a loss near ``loss``."""
    rng = np.random.default_rng(len(samples))
    sample = np.concatenate([rng.permutation(samples) for _ in range(VISITS)])
    ones = np.ones(len(sample), np.float32)
    projection = rng.standard_normal((len(sample), DIM)).astype(np.float16)
    called = np.searchsorted(samples, sample) if renumbered else sample
    own = np.random.default_rng(1).random((SAMPLES, 3)) + 0.1
    rows: dict[str, Any] = {
        "sample": np.array([name_id(f"{i}.png") for i in sample]) if names else called,
        "step": np.arange(len(sample)) // 4,
        "timestep": rng.uniform(0, 1000, len(sample)).astype(np.float32),
        "noise_seed": np.full(len(sample), -1), "lr": ones, "weight": ones, "projection": projection,
        "loss": (loss * (0.5 + own[sample, 0])).astype(np.float32),
        "grad_norm": np.exp(rng.normal(0, 0.2, len(sample))) * np.where(sample == loud, 20, 1),
    }  # fmt: skip
    if looks:
        rows |= dict(zip(COLUMNS, own[sample].astype(np.float32).T, strict=True))
    writer = LogWriter(path, CONFIG)
    if names:
        writer.keep_names({name_id(f"{i}.png"): f"{i}.png" for i in samples})
    writer.put("train", rows)
    writer.close()
    return open_log(path)


KEPT = [i for i in range(SAMPLES) if i not in LEFT_OUT]


@pytest.fixture
def before(tmp_path: Path) -> RunLog:
    return _log(tmp_path / "before", list(range(SAMPLES)))


def test_what_was_left_out_and_what_both_have_are_told_apart(before: RunLog, tmp_path: Path) -> None:
    found = diffhook.compare(before, _log(tmp_path / "after", KEPT))
    assert sorted(found.left_out.sample_ids.tolist()) == LEFT_OUT
    assert sorted(found.before.sample_ids.tolist()) == sorted(found.after.sample_ids.tolist()) == KEPT
    assert not len(found.added)
    whole = diffhook.outliers(before)
    for ranking in (found.before, found.left_out):
        place = [whole.sample_ids.tolist().index(s) for s in ranking.sample_ids]
        np.testing.assert_array_equal(ranking.scores, whole.scores[place])
        assert ranking.reasons == tuple(whole.reasons[i] for i in place)


def test_samples_that_count_anew_in_a_subset_are_found_by_the_exclude_list(
    before: RunLog, tmp_path: Path
) -> None:
    (tmp_path / "exclude.txt").write_text("".join(f"{i}\n" for i in LEFT_OUT))
    after = _log(tmp_path / "after", KEPT, renumbered=True)
    found = diffhook.compare(before, after, excluded=tmp_path / "exclude.txt")
    assert sorted(found.after.sample_ids.tolist()) == KEPT
    assert sorted(found.left_out.sample_ids.tolist()) == LEFT_OUT
    original = diffhook.outliers(after)
    expected = {KEPT[int(s)]: score for s, score in zip(original.sample_ids, original.scores, strict=True)}
    assert expected == dict(zip(found.after.sample_ids.tolist(), found.after.scores.tolist(), strict=True))


def test_numbers_that_mean_other_samples_are_refused(before: RunLog, tmp_path: Path) -> None:
    after = _log(tmp_path / "after", KEPT[::2], renumbered=True)
    with pytest.raises(ConfigurationError, match=r"is not sample .* a Subset counts anew"):
        diffhook.compare(before, after)


def test_names_and_numbers_are_not_compared(before: RunLog, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="has names of its samples"):
        diffhook.compare(before, _log(tmp_path / "after", KEPT, names=True))


def test_runs_without_a_sample_in_common_are_refused(before: RunLog, tmp_path: Path) -> None:
    writer = LogWriter(tmp_path / "other", CONFIG)
    rows = {name: before.train[name] for name in before.train.columns}
    writer.put("train", {**rows, "sample": rows["sample"] + 1000})
    writer.close()
    with pytest.raises(ConfigurationError, match="no sample in common"):
        diffhook.compare(before, tmp_path / "other")


def test_the_change_of_the_loss_is_of_the_same_samples_last_rows(before: RunLog, tmp_path: Path) -> None:
    found = diffhook.compare(before, _log(tmp_path / "after", KEPT, loss=0.9))
    assert found.change is not None
    assert found.change.mean == pytest.approx(-0.1, rel=1e-5)
    assert found.source == "train"
    assert found.loss is not None
    rows = before.train
    late = (rows["step"] >= 0.75 * rows["step"].max()) & np.isin(rows["sample"], KEPT)
    assert sum(b.rows for b in found.loss.before) == late.sum()
    edges = [b.low for b in found.loss.before] + [found.loss.before[-1].high]
    for i, each in enumerate(found.loss.before):
        last = i == len(found.loss.before) - 1
        timestep = rows["timestep"].astype(np.float64)
        inside = late & (timestep >= edges[i]) & ((timestep < edges[i + 1]) | last)
        assert each.median == pytest.approx(np.median(rows["loss"][inside].astype(np.float64)))
    assert [b.low for b in found.loss.after] == edges[:-1], "in the same bins"


def test_who_moved_most_leads(before: RunLog, tmp_path: Path) -> None:
    found = diffhook.compare(before, _log(tmp_path / "after", KEPT, loud=77))
    up = found.moved(5)
    assert found.before.sample_ids[up[0]] == 77
    change = found.scores[:, 1] - found.scores[:, 0]
    assert (np.diff(change[up]) <= 0).all()
    assert (change[up] > 0).all()
    down = found.moved(5, down=True)
    assert (change[down] < 0).all()
    place = found.places[up[0]]
    assert found.after.sample_ids[place[1] - 1] == found.before.sample_ids[place[0] - 1] == 77


def test_named_samples_are_the_same_wherever_they_lie(tmp_path: Path) -> None:
    first = _log(tmp_path / "first", list(range(SAMPLES)), names=True)
    found = diffhook.compare(first, _log(tmp_path / "second", KEPT, names=True))
    assert sorted(found.left_out.names[int(s)] for s in found.left_out.sample_ids) == sorted(
        f"{i}.png" for i in LEFT_OUT
    )


def test_without_losses_the_rest_is_compared(tmp_path: Path) -> None:
    first = _log(tmp_path / "first", list(range(SAMPLES)), loss=np.nan, looks=False)
    found = diffhook.compare(first, _log(tmp_path / "second", KEPT, loss=np.nan, looks=False))
    assert found.loss is None
    assert found.change is None
    assert found.norm is not None
