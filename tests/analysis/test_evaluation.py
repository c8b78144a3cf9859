"""The judges of scores, on cases whose outcome is known."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

import diffhook
from diffhook.analysis import Ranking
from diffhook.analysis.evaluation import (
    detection,
    half_subsets,
    lds,
    lds_lead,
    read_retrained,
    removal,
    retrain,
    tracing,
)
from diffhook.cli import main
from diffhook.errors import ConfigurationError
from diffhook.log import LogWriter, Snapshot, open_log
from diffhook.log.samples import name_id
from tests.analysis.synthetic import SAMPLES, STEPS, config, stored, synthetic, write_queries
from tests.waiting import wait_until

SCORES = [[0.1, 0.2, 0.3, 0.4], [0.2, 0.1, 0.3, 0.4]]
MEASURED = [[0.3, 0.3], [0.4, 0.4], [0.5, 0.3]]
SUBSETS = [[0, 1], [0, 2], [1, 2]]

# Training adds up what samples are worth to three queries. Importable, for processes.
WORTH = np.random.default_rng(0).uniform(0, 1, (3, 20))


def train(subset: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    noise = torch.randn(3).numpy()  # seeded by the caller
    total: npt.NDArray[np.float64] = WORTH[:, subset].sum(1) + 0.01 * noise
    return total


def measure(model: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return 10 - model


def test_the_toy_comes_out_exactly() -> None:
    found = lds(SCORES, SUBSETS, MEASURED)
    np.testing.assert_allclose(found.correlations, [1.0, 0.8660254], atol=1e-7)
    assert found.mean.mean == pytest.approx(0.9330127)
    assert found.ceiling is None


def test_the_ceiling_is_what_another_seeds_losses_reach() -> None:
    other = np.array([[0.4, 0.3], [0.3, 0.4], [0.5, 0.2]])
    found = lds(SCORES, SUBSETS, [MEASURED, other])
    assert found.ceiling is not None
    assert found.ceiling.mean == pytest.approx((0.5 + 0.8660254) / 2)


def test_true_worth_has_a_perfect_lds_and_noise_has_none() -> None:
    made = retrain(train, measure, half_subsets(20, 40), seeds=[0, 1], progress=False)
    assert made.losses.shape == (2, 40, 3)
    assert lds(WORTH, made.subsets, -made.losses).mean.mean > 0.99
    random = np.random.default_rng(5).uniform(size=WORTH.shape)
    assert abs(lds(random, made.subsets, -made.losses).mean.mean) < 0.4


def test_a_lead_is_the_difference_of_two_lds_and_surer_than_each() -> None:
    made = retrain(train, measure, half_subsets(20, 40), progress=False)
    rng = np.random.default_rng(5)
    vague = WORTH + rng.normal(0, 0.2, WORTH.shape)
    vaguer = vague + rng.normal(0, 0.1, WORTH.shape)
    first, second = (lds(scores, made.subsets, -made.losses).mean for scores in (vague, vaguer))
    lead = lds_lead(vague, vaguer, made.subsets, -made.losses)
    assert lead.mean == pytest.approx(first.mean - second.mean)
    assert 0 < lead.error < np.hypot(first.error, second.error)
    assert lds_lead(vague, vague, made.subsets, -made.losses) == (0, 0)


def test_a_query_that_never_changes_does_not_count() -> None:
    found = lds(SCORES, SUBSETS, [[0.3, 1.0], [0.4, 1.0], [0.5, 1.0]])
    assert np.isnan(found.correlations[1])
    assert found.mean.mean == 1.0


def test_processes_and_a_record_give_the_same_and_go_on_where_they_stopped(tmp_path: Path) -> None:
    record = tmp_path / "retrained.jsonl"
    subsets = half_subsets(20, 5)
    here = retrain(train, measure, subsets, seeds=[3], progress=False)
    there = retrain(train, measure, subsets, seeds=[3], record=record, processes=2, progress=False)
    assert (here.losses == there.losses).all()
    lines = record.read_text().splitlines()
    assert len(lines) == 5
    assert sorted(json.loads(line)["subset"] for line in lines) == sorted(s.tolist() for s in subsets)

    def never(subset: Any) -> Any:
        raise AssertionError("this training is in the record")

    again = retrain(never, measure, subsets, seeds=[3], record=record, progress=False)
    assert (again.losses == here.losses).all()
    read = read_retrained(record)
    by_subset = {tuple(s): row for s, row in zip(read.subsets, read.losses[0], strict=True)}
    for subset, row in zip(subsets, here.losses[0], strict=True):
        assert (by_subset[tuple(subset)] == row).all()


def test_removing_what_counts_hurts_more_than_random_removal() -> None:
    top = np.argsort(-WORTH, axis=1)[:, :4]
    found = removal(train, measure, top, 20, seeds=[0, 1], progress=False)
    lost = np.take_along_axis(WORTH, top, 1).sum(1)
    np.testing.assert_allclose(found.removed - found.whole, lost, atol=1e-6)  # same seed, same noise
    assert found.effect.mean > found.control.mean > 0


def test_groups_of_queries_lose_their_tops_together() -> None:
    top = np.argsort(-WORTH, axis=1)[:, :2]
    count, (queries, samples) = 2, WORTH.shape
    found = removal(train, measure, top, samples, together=count, progress=False)
    without_own = removal(train, measure, top, samples, progress=False)
    assert len(found.removed) == queries
    for query in range(queries):
        group = range(query // count * count, min(query // count * count + count, queries))
        gone = np.unique(top[list(group)])
        lost = WORTH[query, gone].sum()
        np.testing.assert_allclose(found.removed[query] - found.whole[query], lost, atol=1e-6)
    assert not np.allclose(found.removed, without_own.removed)


def test_tracing_counts_the_querys_own_source() -> None:
    found = tracing([[0, 1, 2], [3, 4, 0]], ["a", "a", "b", "b", "b"], ["a", "b"])
    np.testing.assert_allclose(found.shares, [2 / 3, 2 / 3])
    assert found.chance == pytest.approx(0.5)
    assert found.cardinality == pytest.approx(5 / 6)


@pytest.mark.parametrize("ties", [False, True])
def test_detection_agrees_with_scikit_learn(ties: bool) -> None:
    rng = np.random.default_rng(1)
    scores = rng.normal(size=60)
    scores = scores.round() if ties else scores
    known = rng.choice(60, 9, replace=False)
    ranking = Ranking.sort(np.arange(60), scores, [[] for _ in scores], "")
    found = detection(ranking, known)
    truth = np.isin(np.arange(60), known)
    assert found.auroc == pytest.approx(roc_auc_score(truth, scores))
    assert found.average_precision == pytest.approx(average_precision_score(truth, scores))
    assert found.base_rate == pytest.approx(9 / 60)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lds(SCORES, SUBSETS, np.zeros((3, 3))), r"shape \(3, 3\); expected .* \(3, 2\)"),
        (lambda: lds(SCORES, SUBSETS[:2], np.zeros((2, 2))), "2 subsets; a rank correlation needs 3"),
        (lambda: lds(SCORES, [[0], [1], [4]], MEASURED), "names sample 4, but there are scores of 4"),
        (lambda: half_subsets(4, share=1.0), "expected some, not all"),
        (lambda: removal(train, measure, [[20]], 20), "ids of 20 samples"),
        (lambda: removal(train, measure, [[0], [1]], 20, together=0), "together is 0"),
        (lambda: removal(train, measure, [[0], [1]], 2, together=2), "are all 2 samples"),
        (lambda: tracing([[5]], ["a"], ["a"]), "sources of 1 samples, but the top names 5"),
    ],
)
def test_wrong_input_says_what_was_expected(call: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        call()


def test_the_command_judges_by_sources_outliers_and_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = synthetic(tmp_path / "log", replicates=1)
    (tmp_path / "toy_training.py").write_text(
        "import numpy as np\n"
        "def train(ids):\n    return np.bincount(ids, minlength=18) @ np.arange(18.0)\n"
        "def losses(model):\n    return [model] * 4\n"
    )
    np.save(tmp_path / "sources.npy", np.arange(18) % 2)
    (tmp_path / "asked.txt").write_text("0\n1\n0\n1\n")
    (tmp_path / "known.txt").write_text("3\n5\n")
    monkeypatch.setattr(sys, "path", [*sys.path])
    script = tmp_path / "toy_training.py"
    options = {
        "queries": "new",
        "top": 3,
        "sources": tmp_path / "sources.npy",
        "query-sources": tmp_path / "asked.txt",
        "outliers": tmp_path / "known.txt",
        "subsets": 6,
        "train": f"{script}:train",
        "measure": f"{script}:losses",
        "record": tmp_path / "runs.jsonl",
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    methods = ["--methods", "tracin", "cosine"]
    assert main(["evaluate", str(tmp_path / "log"), *words, *methods, "--remove", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    figures = [row["figure"] for row in rows if row["scores"] in ("tracin", "outliers")]
    assert figures == [
        "AUROC", "average precision", "top-3 of the query's source", "top-3 cardinality",
        "LDS over 6 subsets", "loss rise without the top 3",
    ]  # fmt: skip
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 6
    top = {row["figure"]: row["value"] for row in rows if row["scores"] == "cosine"}
    ids = diffhook.influence(made.log, "new", "cosine").top(3).sample_ids
    assert set(ids.flat) <= set(SAMPLES.tolist())
    assert top["top-3 cardinality"] == pytest.approx(len(np.unique(ids)) / 12)
    assert top["loss rise without the top 3"] == pytest.approx(-ids.sum(1).mean())


@pytest.mark.parametrize("named", [True, False], ids=["names", "keys"])
def test_the_command_trains_on_the_ids_of_samples_that_are_no_indices(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    ids = np.sort([name_id(f"{index}.png") for index in range(len(SAMPLES))])
    made = synthetic(tmp_path / "plain", replicates=1)
    writer = LogWriter(tmp_path / "log", config())
    rows = stored(made.train)
    writer.put("train", {**rows, "sample": ids[np.searchsorted(SAMPLES, rows["sample"])]})
    for step in STEPS:
        writer.snapshot(Snapshot(step, 0.1, 0.4, writer.session), b"")
    if named:
        writer.keep_names({name_id(f"{index}.png"): f"{index}.png" for index in range(len(SAMPLES))})
    writer.close()
    write_queries(tmp_path / "log", "new", made.queries["new"])
    script = tmp_path / "named_training.py"
    script.write_text(
        "import numpy as np\n"
        f"IDS = np.array({ids.tolist()})\n"
        "def train(ids):\n    assert np.isin(ids, IDS).all()\n    return ids\n"
        "def losses(ids):\n    return [np.searchsorted(IDS, ids).sum()] * 4\n"
    )
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "named_training", raising=False)
    command = ["evaluate", str(tmp_path / "log"), "--queries", "new", "--methods", "tracin", "--top", "2"]
    command += ["--subsets", "6", "--record", str(tmp_path / "runs.jsonl"), "--json"]
    training = ["--train", f"{script}:train", "--measure", f"{script}:losses", "--remove"]
    assert main([*command, *training]) == 0
    found = json.loads(capsys.readouterr().out)
    scores = diffhook.influence(open_log(tmp_path / "log"), "new", "tracin")
    (read, loss_rise) = found
    subsets = half_subsets(len(ids), 6)
    losses = np.array([[subset.sum()] * 4 for subset in subsets])
    assert read["value"] == pytest.approx(lds(scores.values, subsets, -losses).mean.mean)
    top = np.searchsorted(ids, scores.top(2).sample_ids)
    assert loss_rise["value"] == pytest.approx(-top.sum(1).mean())
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)[0]["value"] == read["value"]
    (tmp_path / "runs.jsonl").write_text('{"seed": 0, "losses": [1, 1, 1, 1], "subset": [1, 2]}\n')
    assert main(command) == 2
    assert "names sample 1, which the log does not know" in capsys.readouterr().err


def test_a_source_is_a_line_whatever_it_is_written_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = synthetic(tmp_path / "log", replicates=1)
    own = [("red fox", "blue whale")[sample % 2] for sample in range(18)]
    asked = ["red fox", "blue whale", "red fox", "blue whale"]
    (tmp_path / "own.txt").write_text("\n".join(own) + "\n\n")
    (tmp_path / "asked.txt").write_bytes("\r\n".join(asked).encode())
    np.save(tmp_path / "numbers.npy", np.arange(18) % 2)
    (tmp_path / "0101.txt").write_text("0\n1\n0\n1\n")
    expected = tracing(
        diffhook.influence(made.log, "new", "tracin").top(3).sample_ids, np.array(own), np.array(asked)
    )
    assert 0 < expected.precision.mean < 1
    for sources in (("own.txt", "asked.txt"), ("numbers.npy", "0101.txt")):
        files = [str(tmp_path / name) for name in sources]
        command = ["evaluate", str(tmp_path / "log"), "--queries", "new", "--methods", "tracin", "--top", "3"]
        assert main([*command, "--sources", files[0], "--query-sources", files[1], "--json"]) == 0
        assert json.loads(capsys.readouterr().out)[0]["value"] == expected.precision.mean


def test_the_command_says_what_it_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    synthetic(tmp_path / "log", replicates=1)
    assert main(["evaluate", str(tmp_path / "log"), "--queries", "new"]) == 2
    assert "nothing to judge by" in capsys.readouterr().err
    command = ["evaluate", str(tmp_path / "log"), "--queries", "new", "--train", "nowhere.py:f"]
    assert main(command) == 2
    assert "expected FILE.py:NAME of a function" in capsys.readouterr().err


def train_or_fail(subset: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Sample 0 first: fails once another training runs, which ends after that."""
    folder = Path(os.environ["BEGUN"])
    (folder / f"begun-{subset[0]}").touch()
    if subset[0] == 0:
        wait_until((folder / "begun-1").exists)
        (folder / "failed").touch()
        raise ArithmeticError("no such luck")
    wait_until((folder / "failed").exists)
    time.sleep(2)
    return train(subset)


def test_when_a_training_fails_what_runs_is_recorded_and_nothing_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BEGUN", str(tmp_path))
    record = tmp_path / "retrained.jsonl"
    subsets = [[first, 7] for first in range(5)]
    with pytest.raises(ArithmeticError, match="no such luck"):
        retrain(train_or_fail, measure, subsets, record=record, processes=2, progress=False)
    assert [json.loads(line)["subset"] for line in record.read_text().splitlines()] == [[1, 7]]
    assert {path.name for path in tmp_path.glob("begun-*")} == {"begun-0", "begun-1"}


def test_an_interrupt_waits_for_what_runs_and_records_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from concurrent.futures import wait

    from diffhook.analysis.evaluation import retraining

    calls = []

    def interrupted(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return wait(*arguments, **options)

    monkeypatch.setattr(retraining, "wait", interrupted)
    record = tmp_path / "retrained.jsonl"
    with pytest.raises(KeyboardInterrupt):
        retrain(train, measure, half_subsets(20, 5), record=record, processes=2, progress=False)
    assert len(record.read_text().splitlines()) == 2


def test_a_line_that_was_torn_off_is_trained_again(tmp_path: Path) -> None:
    record = tmp_path / "retrained.jsonl"
    subsets = half_subsets(20, 4)
    whole = retrain(train, measure, subsets, record=record, progress=False)
    lines = record.read_bytes().splitlines(keepends=True)
    for torn in (lines[3][:1], lines[3][:-2], lines[3][:-1]):
        record.write_bytes(b"".join(lines[:3]) + torn)
        assert len(read_retrained(record).subsets) == 3
        again = retrain(train, measure, subsets, record=record, progress=False)
        assert (again.losses == whole.losses).all()
        assert record.read_bytes() == b"".join(lines)
    record.write_bytes(lines[0][:9])
    assert len(retrain(train, measure, subsets[:1], record=record, progress=False).losses) == 1
    assert record.read_bytes() == lines[0]


def test_a_record_of_other_queries_is_found_before_it_grows(tmp_path: Path) -> None:
    record = tmp_path / "retrained.jsonl"
    subsets = half_subsets(20, 5)
    retrain(train, measure, subsets[:2], record=record, progress=False)
    before = record.read_bytes()
    trained = []

    def noted(subset: Any) -> Any:
        trained.append(subset)
        return train(subset)

    def fewer(model: Any) -> Any:
        return measure(model)[:2]

    with pytest.raises(ConfigurationError, match="line 1: 3 losses; expected 2: it is of another evaluation"):
        retrain(noted, fewer, subsets, queries=2, record=record, progress=False)
    with pytest.raises(ConfigurationError, match="line 1: 3 losses; expected 2"):
        removal(noted, fewer, [[0], [1]], 20, record=record, progress=False)
    assert trained == []
    with pytest.raises(ConfigurationError, match=r"gave 2 losses; expected 3, as in .*: name another file"):
        retrain(noted, fewer, subsets, record=record, progress=False)
    assert len(trained) == 1
    assert record.read_bytes() == before
    with pytest.raises(ConfigurationError, match=r"^measure gave 2 losses; expected 3$"):
        removal(noted, fewer, [[0], [1], [2]], 20, progress=False)
    record.write_bytes(before + b'{"seed": 1, "losses": [1.0], "subset": [1]}\n')
    with pytest.raises(ConfigurationError, match="line 3: 1 losses; expected 3"):
        read_retrained(record)


def test_a_damaged_line_within_the_record_is_an_error(tmp_path: Path) -> None:
    record = tmp_path / "retrained.jsonl"
    retrain(train, measure, half_subsets(20, 3), record=record, progress=False)
    first, second, third = record.read_bytes().splitlines(keepends=True)
    record.write_bytes(first + second[:9] + b"\n" + third)
    with pytest.raises(ConfigurationError, match="line 2: not a training that was recorded"):
        retrain(train, measure, half_subsets(20, 3), record=record, progress=False)
