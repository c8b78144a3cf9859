"""Each method against its formula, written out in loops over whole gradients in float64."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

import diffhook
from diffhook.analysis import second_moment
from diffhook.analysis.effective_dimension import effective_dimension
from diffhook.analysis.execution import Execution
from diffhook.analysis.methods import METHODS, TRAK, find_method, whitening
from diffhook.cli import main
from diffhook.errors import ConfigurationError
from tests.analysis.formulas import (
    close,
    direct,
    kernel_of,
    left_out,
    moment,
    of_events,
    query_direction,
    rows_of_sample,
)
from tests.analysis.synthetic import SAMPLES, STEPS, Rows, Synthetic, synthetic


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Synthetic:
    return synthetic(tmp_path_factory.mktemp("methods") / "log")


@pytest.mark.parametrize("source", ["train", "probe"])
@pytest.mark.parametrize("method", ["tracin", "retrac", "cosine", "trak", "whitened-retrac"])
def test_scores_equal_the_formula(made: Synthetic, method: str, source: str) -> None:
    found = diffhook.influence(made.log, "new", method, source)
    if (method, source) == ("whitened-retrac", "train"):
        expected = of_events(made.train, made.queries["new"])
        assert not np.allclose(expected, direct(made.train, made.queries["new"], method), rtol=0.1)
    else:
        expected = direct(getattr(made, source), made.queries["new"], method)
    close(found.values, expected)


def test_the_default_is_whitened_retrac_on_probes_that_hold_every_sample(made: Synthetic) -> None:
    found = diffhook.influence(made.log, "new")
    assert (found.method, found.source) == ("whitened-retrac", "probe")
    close(found.values, direct(made.probe, made.queries["new"], "whitened-retrac"))
    np.testing.assert_array_equal(diffhook.influence(made.log.location, "new").values, found.values)


def test_probes_that_lack_samples_are_not_the_default(tmp_path: Path) -> None:
    made = synthetic(tmp_path / "log", probed=SAMPLES[1:])
    assert diffhook.influence(made.log, "new").source == "train"
    assert diffhook.influence(made.log, "new", source="probe").source == "probe"


def test_many_dimensions_are_whitened_in_blocks(made: Synthetic, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block with a ridge of its own, as if it were a projection by itself; the unit is that of all."""
    monkeypatch.setattr(whitening, "BLOCK", 10)
    expected = np.zeros((4, len(SAMPLES)))
    for part in (slice(0, 10), slice(10, 20), slice(20, 24)):
        for step in STEPS:
            features, queries = np.zeros((len(SAMPLES), 24)), np.zeros((4, 24))
            for i, sample in enumerate(SAMPLES):
                mine = [g / np.linalg.norm(g) for g, _, _ in rows_of_sample(made.probe, sample, step)]
                features[i] = np.mean(mine, axis=0)
            for q in range(4):
                queries[q] = query_direction(made.queries["new"], q, step, "whitened-retrac", [0, 1, 2])
            mine, asked = features[:, part], queries[:, part]
            gram = moment(made.probe)
            unit = np.trace(gram) / len(gram) / np.diag(gram)[part].mean()
            kernel = unit**2 * kernel_of("whitened-retrac", gram[part, part])
            expected += asked @ kernel @ mine.T / len(STEPS)
    close(diffhook.influence(made.log, "new", source="probe").values, expected)
    tight = diffhook.influence(made.log, "new", source="probe", execution=Execution(memory=512)).values
    close(tight, expected)


@pytest.mark.parametrize("source", ["train", "probe"])
def test_of_many_rows_the_second_moment_is_that_of_a_share_of_them(
    made: Synthetic, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawn by their positions: again the same, and near what all rows give."""
    rows, method, table = getattr(made, source), find_method("whitened-retrac"), getattr(made.log, source)
    (whole,) = second_moment.second_moment(table, method, Execution())
    np.testing.assert_allclose(whole, moment(rows), atol=1e-6)
    monkeypatch.setattr(second_moment, "ROWS", len(rows) * 3 // 4)
    (some,) = second_moment.second_moment(table, method, Execution())
    (again,) = second_moment.second_moment(table, method, Execution(scheduler="synchronous"))
    np.testing.assert_array_equal(some, again)
    assert np.trace(some) == pytest.approx(1, rel=1e-5), "a mean over rows of unit length"
    assert 0 < np.linalg.norm(some - whole) < 0.3 * np.linalg.norm(whole)


def test_what_all_samples_share_does_not_decide_after_whitening(tmp_path: Path) -> None:
    """A common direction five times as long as the samples' own hardly lets queries differ."""
    made = synthetic(tmp_path / "log", shared=5.0)
    own = [SAMPLES.tolist().index(s) for s in (2, 3)]
    excess = {}
    for method in ("retrac", "whitened-retrac"):
        values = diffhook.influence(made.log, "twins", method, "probe").values
        others = np.array([np.delete(row, i).mean() for row, i in zip(values, own, strict=True)])
        excess[method] = (values[[0, 1], own] - others) / np.abs(others)
    assert (excess["retrac"] < 0.2).all(), "the common direction is most of every score"
    assert (excess["whitened-retrac"] > 1).all(), "a query's own sample stands out"


def test_the_effective_dimension_is_that_of_the_rows_directions(made: Synthetic) -> None:
    units = made.probe.gradient / np.linalg.norm(made.probe.gradient, axis=1, keepdims=True)
    moment = units.T @ units / len(units)
    ridge = 0.1 * np.trace(moment) / len(moment)
    expected = np.trace(moment @ np.linalg.inv(moment + ridge * np.eye(len(moment))))
    found = effective_dimension(made.log)
    assert found.value == pytest.approx(expected, rel=1e-4)
    assert (found.dim, found.rows, found.source) == (24, len(units), "probe")
    assert not found.enough, "random rows fill 24 dimensions"
    assert "a larger projection_dim" in str(diffhook.bias(made.log).dimension)


def test_d_trak_is_trak_on_the_squared_output(made: Synthetic) -> None:
    found = diffhook.influence(made.log, "squared", "d-trak", "train-squared")
    close(found.values, direct(made.queries["train-squared"], made.queries["squared"], "d-trak"))


def test_das_multiplies_by_the_samples_residual(made: Synthetic) -> None:
    found = diffhook.influence(made.log, "mean", "das", "train-mean")
    expected = direct(made.queries["train-mean"], made.queries["mean"], "das")
    loss, sample = made.probe.columns["loss"], made.probe.columns["sample"]
    each = [loss[sample == i].astype(float) for i in SAMPLES]
    residual = np.array([np.sqrt(mine).mean() / np.sqrt(mine.mean()) for mine in each])
    close(found.values, expected * residual)


def test_ridge_is_a_choice(made: Synthetic) -> None:
    found = diffhook.influence(made.log, "new", TRAK(ridge=3.0), "probe")
    close(found.values, direct(made.probe, made.queries["new"], "trak", ridge=3.0))
    with pytest.raises(ConfigurationError, match="ridge is 0; expected a positive number"):
        TRAK(ridge=0)


@pytest.mark.parametrize(
    ("method", "source", "queries", "wrong"),
    [
        ("d-trak", "train", "squared", "source 'train' holds those of the loss"),
        ("d-trak", "train-squared", "new", "queries 'new' holds those of the loss"),
        ("das", "train-squared", "mean", "source 'train-squared' holds those of the squared-output"),
        ("tracin", "train-mean", "new", "source 'train-mean' holds those of the mean-output"),
    ],
)
def test_gradients_of_another_scalar_are_refused(
    made: Synthetic, method: str, source: str, queries: str, wrong: str
) -> None:
    with pytest.raises(ConfigurationError, match=wrong):
        diffhook.influence(made.log, queries, method, source)


@pytest.mark.parametrize("method", ["tracin", "retrac", "cosine", "trak", "whitened-retrac"])
def test_errors_on_the_grid_are_the_jackknife_over_replicates_of_both_sides(
    made: Synthetic, method: str
) -> None:
    found = diffhook.influence(made.log, "new", method, "probe")
    without = [left_out(made, method, gone) for gone in range(3)]
    spread = np.square(np.array(without) - np.mean(without, axis=0)).sum(0)
    assert found.errors is not None
    assert found._pass.draws is not None
    spread *= found._pass.draws.variance_share().mean()  # 1, but for whitening
    np.testing.assert_allclose(
        found.errors, np.sqrt(2 / 3 * spread), rtol=1e-3, atol=1e-6 * np.abs(without).max()
    )


def test_stability_is_the_share_of_the_top_that_stays(made: Synthetic) -> None:
    found = diffhook.influence(made.log, "new", "retrac", "probe")
    expected = np.zeros(4)
    for gone in range(3):
        other = left_out(made, "retrac", gone)
        for q in range(4):
            mine = set(np.argsort(-found.values[q])[:3])
            expected[q] += len(mine & set(np.argsort(-other[q])[:3])) / 9
    stability = found.stability(3)
    assert stability is not None
    np.testing.assert_allclose(stability, expected)
    assert (stability < 1).any(), "no resampling changed any top: the test cannot see a wrong stability"


@pytest.mark.parametrize("opponents", [False, True])
@pytest.mark.parametrize("memory", [1 << 30, 512], ids=["whole", "in parts"])
def test_the_certainty_of_a_top_is_that_of_all_scores(made: Synthetic, memory: int, opponents: bool) -> None:
    found = diffhook.influence(made.log, "new", "retrac", "probe", execution=Execution(memory=memory))
    top = found.top(3, opponents=opponents)
    certainty = found.certainty(top, opponents=opponents)
    assert certainty is not None
    assert not {"values", "errors"} & set(vars(found)), "the top must not compute the whole matrix"
    columns = np.searchsorted(SAMPLES, top.sample_ids)
    assert found.errors is not None
    np.testing.assert_array_equal(certainty.errors, np.take_along_axis(found.errors, columns, 1))
    sign, expected = -1 if opponents else 1, np.zeros(4)
    for gone in range(3):
        other = left_out(made, "retrac", gone)
        for q in range(4):
            expected[q] += len(set(columns[q]) & set(np.argsort(-sign * other[q])[:3])) / 9
    assert certainty.stability is not None
    np.testing.assert_allclose(certainty.stability, expected)
    margins = found.errors * scipy.stats.t.ppf(0.975, 2)
    np.testing.assert_array_equal(
        certainty.beyond, np.take_along_axis(abs(found.values) > margins, columns, 1)
    )


def test_a_csv_has_the_error_of_every_score_where_there_are_any(made: Synthetic, tmp_path: Path) -> None:
    found = diffhook.influence(made.log, "new", "retrac", "probe")
    for k in (2, None):
        found.to_csv(tmp_path / "scores.csv", k)
        with open(tmp_path / "scores.csv") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == 4 * (k or len(SAMPLES))
        assert found.errors is not None
        for row in rows:
            at = int(row["query"]), int(np.searchsorted(SAMPLES, int(row["sample"])))
            assert float(row["score"]) == found.values[at]
            assert float(row["error"]) == found.errors[at]


def test_one_replicate_has_no_errors(tmp_path: Path) -> None:
    found = diffhook.influence(synthetic(tmp_path / "log", replicates=1).log, "new")
    assert found.errors is None
    assert found.stability(2) is found.certainty(found.top(2)) is found.certainty_cost is None
    found.to_csv(tmp_path / "scores.csv", 1)
    assert (tmp_path / "scores.csv").read_text().startswith("query,rank,sample,score\n")


@pytest.mark.parametrize("source", ["train", "probe"])
@pytest.mark.parametrize("method", ["tracin", "retrac", "trak", "whitened-retrac"])
def test_timesteps_add_up_to_the_score(made: Synthetic, method: str, source: str) -> None:
    scores = diffhook.influence(made.log, "new", method, source)
    top = scores.top(3)
    found = diffhook.influence_by_timestep(made.log, "new", top.sample_ids, method, source, bins=5)
    assert found.values.shape == (4, 3, 5)
    close(found.values.sum(2), top.scores)


def test_influence_is_put_at_the_timestep_of_its_row(made: Synthetic) -> None:
    found = diffhook.influence_by_timestep(made.log, "new", np.full((4, 1), 5), "tracin", "probe", bins=4)
    assert found.edges.tolist() == [100.0, 300.0, 500.0, 700.0, 900.0]
    chosen = made.probe.columns["timestep"] == 500
    rows = Rows(made.probe.gradient[chosen], {c: v[chosen] for c, v in made.probe.columns.items()})
    expected = direct(rows, made.queries["new"], "tracin")[:, SAMPLES.tolist().index(5)]
    close(found.values[:, 0, 2], expected)
    assert (found.values[:, 0, 1] == 0).all()


def test_timesteps_of_samples_that_are_not_there_are_an_error(made: Synthetic) -> None:
    with pytest.raises(ConfigurationError, match="sample 4 has no rows in source 'probe'"):
        diffhook.influence_by_timestep(made.log, "new", np.full((4, 1), 4))
    with pytest.raises(ConfigurationError, match=r"shape \(3, 1\); expected \(4, k\)"):
        diffhook.influence_by_timestep(made.log, "new", np.full((3, 1), 5))


def test_help_lists_every_method_with_formula_and_source(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["influence", "anywhere", "--method", "help", "--json"]) == 0
    shown = capsys.readouterr().out
    for method in METHODS.values():
        assert method.name in shown
        assert method.reference.split(",")[0] in shown
