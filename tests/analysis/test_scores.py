"""Scores from the log against method.md's formulas over full gradients, written out directly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import scipy.stats
import torch
from torch import Tensor

import diffhook
from diffhook.analysis.execution import Execution
from diffhook.analysis.methods import COMPARED
from diffhook.capture.objective.noise import noise_bank, noise_seed
from diffhook.errors import ConfigurationError, LogError
from tests.analysis.synthetic import synthetic, write_queries
from tests.models import unet
from tests.runs import SCHEDULER, Run, TinyDenoiser, denoising_losses, identified, train
from tests.twins import sample_gradients

OBJECTIVE = diffhook.DiffusionObjective(SCHEDULER)
GRID = diffhook.Grid(timesteps=[5, 300, 900], draws=2)


def _snapshot_models(log: diffhook.RunLog, make_model: Any) -> list[tuple[Any, torch.nn.Module]]:
    found = []
    for snapshot in log.snapshots:
        model = make_model()
        model.load_state_dict(safetensors.torch.load(snapshot.parameters()))
        found.append((snapshot, model))
    return found


def _grid_gradients(
    model: torch.nn.Module, images: Tensor, grid: diffhook.Grid, *, own_noise: bool = False
) -> Tensor:
    """(samples, S, P): at each timestep the mean over draws of the gradient."""
    owners = [i if own_noise else None for i in range(len(images))]
    by_time = []
    for timestep in grid.timesteps:  # type: ignore[union-attr]
        draws = []
        for draw in range(grid.draws):
            seeds = torch.tensor([noise_seed(grid.seed, timestep, draw, owner) for owner in owners])
            noise = noise_bank(seeds, images)
            times = torch.full((len(images),), timestep)
            draws.append(sample_gradients(model, denoising_losses, (images, noise, times)))
        by_time.append(torch.stack(draws).mean(0))
    return torch.stack(by_time, 1)


def _side(gradients: Tensor, method: str) -> Tensor:
    """(samples, P): the mean over timesteps, for ReTrac of normalised gradients."""
    if method == "retrac":
        gradients = gradients / gradients.norm(dim=2, keepdim=True)
    return gradients.mean(1)


def _nearest(step: int, snapshots: list[int]) -> int:
    return min(range(len(snapshots)), key=lambda k: (abs(snapshots[k] - step), snapshots[k]))


def direct_events(
    log: diffhook.RunLog, run: Run, queries: Tensor, method: str, make_model: Any
) -> np.ndarray:
    models = _snapshot_models(log, make_model)
    asked = [_side(_grid_gradients(model, queries, GRID, own_noise=True), method) for _, model in models]
    scores = np.zeros((len(queries), len(run.data)))
    for event in run.events:
        gradient = event.gradient / event.gradient.norm() if method == "retrac" else event.gradient
        k = _nearest(event.step, [s.step for s, _ in models])
        scores[:, event.sample] += (asked[k] @ gradient).numpy() * event.lr * event.weight
    return scores


def direct_grid(
    log: diffhook.RunLog, data: Tensor, queries: Tensor, method: str, batch: int, make_model: Any
) -> np.ndarray:
    scores = np.zeros((len(queries), len(data)))
    for snapshot, model in _snapshot_models(log, make_model):
        weight = snapshot.lr_sum * batch / len(data)
        mine = _side(_grid_gradients(model, data, GRID), method)
        asked = _side(_grid_gradients(model, queries, GRID), method)
        scores += weight * (asked @ mine.T).numpy()
    return scores


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[diffhook.RunLog, Run, Tensor]:
    """A small run with whole gradients in place of projections; its own samples as queries too."""
    path = tmp_path_factory.mktemp("full") / "log"
    run = train(
        path,
        twin=True,
        projection_dim="full",
        snapshot_every=4,
        objective=OBJECTIVE,
        probe=diffhook.Probe(samples=None, grid=GRID),
    )
    log = diffhook.open_log(path)
    queries = torch.randn(3, 1, 8, 8)
    diffhook.query(log, (queries,), "new", OBJECTIVE, model=TinyDenoiser(), grid=GRID)
    diffhook.query(log, (run.data,), "training", OBJECTIVE, model=TinyDenoiser(), grid=GRID)
    return log, run, queries


methods = pytest.mark.parametrize("method", ["tracin", "retrac"])


@methods
def test_event_scores_equal_the_formula(full: Any, method: str) -> None:
    log, run, queries = full
    found = diffhook.influence(log, "new", method, "train")
    expected = direct_events(log, run, queries, method, TinyDenoiser)
    assert found.sample_ids.tolist() == list(range(12))
    assert found.query_ids.tolist() == [0, 1, 2]
    np.testing.assert_allclose(found.values, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@methods
def test_grid_scores_equal_the_formula(full: Any, method: str) -> None:
    log, run, queries = full
    found = diffhook.influence(log, "new", method, "probe")
    expected = direct_grid(log, run.data, queries, method, 4, TinyDenoiser)
    np.testing.assert_allclose(found.values, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@methods
def test_self_influence_is_the_diagonal_of_the_pairwise_matrix(full: Any, method: str) -> None:
    log, _, _ = full
    matrix = diffhook.influence(log, "training", method, "probe").values
    ranking = diffhook.self_influence(log, method, "probe")
    assert (np.diff(ranking.scores) <= 0).all()
    np.testing.assert_allclose(ranking.scores, np.diag(matrix)[ranking.sample_ids], rtol=1e-4)


@methods
def test_event_self_influence_equals_the_formula(full: Any, method: str) -> None:
    log, run, _ = full
    steps = [s.step for s in log.snapshots]
    expected = np.zeros(len(run.data))
    for sample in range(len(run.data)):
        for k in range(len(steps)):
            mine = [e for e in run.events if e.sample == sample and _nearest(e.step, steps) == k]
            if mine:
                weights = torch.tensor([e.lr * e.weight for e in mine], dtype=torch.float64)
                gradients = torch.stack([e.gradient for e in mine])
                if method == "retrac":
                    gradients = gradients / gradients.norm(dim=1, keepdim=True)
                mean = (weights[:, None] * gradients).sum(0) / weights.sum()
                expected[sample] += float(weights.sum() * mean.square().sum())
    ranking = diffhook.self_influence(log, method, "train")
    np.testing.assert_allclose(ranking.scores, expected[ranking.sample_ids], rtol=1e-4)


@pytest.fixture(scope="module")
def sketched(tmp_path_factory: pytest.TempPathFactory) -> tuple[diffhook.RunLog, Run]:
    """A run of a UNet with attention, projected to D = 2048."""
    path = tmp_path_factory.mktemp("sketched") / "log"
    data = torch.randn(24, 1, 16, 16).cumsum(2).cumsum(3) / 10  # smooth, unlike the noise
    data[:, 0, 0, 0] = torch.arange(24) / 16
    run = train(
        path, make_model=lambda: unet().model, data=data, batch_size=8, epochs=2, twin=True, snapshot_every=3
    )
    log = diffhook.open_log(path)
    diffhook.query(log, (data[:6] + 0.1,), "new", OBJECTIVE, grid=GRID)
    return log, run


@methods
def test_projected_scores_rank_pairs_as_full_gradients_do(sketched: Any, method: str) -> None:
    log, run = sketched
    found = diffhook.influence(log, "new", method).values
    expected = direct_events(log, run, run.data[:6] + 0.1, method, lambda: unet().model)
    correlation = scipy.stats.spearmanr(found.ravel(), expected.ravel()).statistic
    assert correlation >= 0.98, f"Spearman over pairs at D = 2048: {correlation:.4f}"


@methods
def test_scores_add_up_over_checkpoints(full: Any, method: str) -> None:
    """A sum over checkpoints of dot products, not a dot product of sums."""
    log, _, _ = full
    whole = diffhook.influence(log, "new", method, "probe").values
    table, asked = log.probe, log.queries["new"]
    sums = np.zeros_like(whole, dtype=np.float64)
    for step in np.unique(table["step"]):
        mine, theirs = table["step"] == step, (asked["step"] == step) & (asked["own_noise"] == 0)
        length = (lambda t, r: t["grad_norm"][r]) if method == "tracin" else (lambda t, r: np.ones(r.sum()))
        left = np.zeros((12, table.dim))
        weights = table["lr"][mine] * table["weight"][mine] * length(table, mine)
        np.add.at(left, table["sample"][mine], table["projection"][mine] * weights[:, None])
        right = np.zeros((3, table.dim))
        weights = asked["weight"][theirs] * length(asked, theirs)
        np.add.at(right, asked["sample"][theirs], asked["projection"][theirs] * weights[:, None])
        sums += right @ left.T
    np.testing.assert_allclose(whole, sums, rtol=1e-4, atol=1e-6 * np.abs(sums).max())


def test_scaling_a_samples_loss_changes_tracin_and_not_retrac(tmp_path: Path) -> None:
    class Scaled(diffhook.DiffusionObjective):
        """Sample 0's loss counts ten times."""

        def __call__(self, model: Any, batch: Any, timesteps: Tensor, noise_seeds: Tensor) -> Tensor:
            losses = super().__call__(model, batch, timesteps, noise_seeds)
            first = (batch[0][:, 0, 0, 0] == 0).to(losses.dtype)
            return losses * (1 + 9 * first)

    values: dict[str, dict[str, np.ndarray]] = {}
    for name, objective in (("plain", OBJECTIVE), ("scaled", Scaled(SCHEDULER))):
        path = tmp_path / name
        train(path, objective=objective, probe=diffhook.Probe(samples=None, grid=GRID), snapshot_every=4)
        log = diffhook.open_log(path)
        diffhook.query(log, (torch.ones(2, 1, 8, 8),), "new", OBJECTIVE, model=TinyDenoiser(), grid=GRID)
        values[name] = {m: diffhook.influence(log, "new", m, "probe").values for m in ("tracin", "retrac")}
    factor = np.ones(12)
    factor[0] = 10
    np.testing.assert_allclose(values["scaled"]["tracin"], values["plain"]["tracin"] * factor, rtol=1e-3)
    np.testing.assert_allclose(
        values["scaled"]["retrac"], values["plain"]["retrac"], rtol=1e-2,
        atol=1e-3 * np.abs(values["plain"]["retrac"]).max(),
    )  # fmt: skip


def test_rows_that_are_not_finite_count_for_nothing(tmp_path: Path) -> None:
    data = identified()
    data[4, 0, 5, 5] = torch.nan
    train(tmp_path / "log", data=data, epochs=1, projection_dim=64, batch_size=1)
    log = diffhook.open_log(tmp_path / "log")
    bad = log.train["sample"][~np.isfinite(log.train["grad_norm"])]
    assert 4 in bad, "the NaN pixel's gradient must be seen as it is"
    assert np.isfinite(log.train["projection"]).all()
    ranking = diffhook.outliers(log)
    assert np.isinf(ranking.scores[0])
    assert "gradient not finite" in ranking.reasons[0][0]


def test_queries_that_are_not_finite_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = synthetic(tmp_path / "log", replicates=1)
    diffhook.influence(made.log, "new")
    assert not caplog.records
    rows = made.queries["new"]
    sample, step = rows.columns["sample"], rows.columns["step"]
    rows.gradient[(sample == 2) | ((sample == 1) & (step == 8))] = np.nan
    write_queries(tmp_path / "log", "broken", rows)
    scores = diffhook.influence(diffhook.open_log(tmp_path / "log"), "broken")
    assert not scores.values[2].any()
    assert scores.values[[0, 1, 3]].all()
    (record,) = caplog.records
    assert "18 of the 48 gradients of queries 'broken' are not finite (steps 4, 8)" in record.message
    assert "all scores of 2 are 0" in record.message


def test_threads_and_the_synchronous_scheduler_agree_to_the_bit(full: Any) -> None:
    log, _, _ = full
    one = diffhook.influence(log, "new", execution=Execution(scheduler="synchronous")).values
    assert (one == diffhook.influence(log, "new", execution=Execution(scheduler="threads")).values).all()


def test_top_k_is_sorted_and_names_the_samples(full: Any) -> None:
    log, _, _ = full
    scores = diffhook.influence(log, "new")
    top, low = scores.top(4), scores.top(4, opponents=True)
    order = np.argsort(-scores.values, axis=1)
    assert (top.sample_ids == scores.sample_ids[order[:, :4]]).all()
    assert (low.sample_ids == scores.sample_ids[order[:, ::-1][:, :4]]).all()
    assert (top.scores == np.take_along_axis(scores.values, order[:, :4], 1)).all()
    assert scores.top(99).sample_ids.shape == (3, 12)


def test_a_single_event_makes_retrac_self_influence_constant_and_says_so(tmp_path: Path) -> None:
    train(tmp_path / "log", epochs=1, projection_dim=256)
    ranking = diffhook.self_influence(diffhook.open_log(tmp_path / "log"), "retrac", "train")
    assert all("constant" in flags[0] for flags in ranking.reasons)


def test_bias_reports_what_it_should(full: Any) -> None:
    log, run, _ = full
    report = diffhook.bias(log, k=3, bins=4)
    norms = np.array([float(e.gradient.norm()) for e in run.events])
    times = np.array([e.timestep for e in run.events])
    expected = scipy.stats.spearmanr(times, norms)
    np.testing.assert_allclose(report.correlation, expected.statistic, atol=1e-3)
    np.testing.assert_allclose(report.p_value, expected.pvalue, rtol=0.1)
    assert sum(b.rows for b in report.norms) == len(run.events)
    names = {(g.queries, g.method) for g in report.generality}
    assert names == {(q, m) for q in ("new", "training") for m in COMPARED}
    for g in report.generality:
        top = diffhook.influence(log, g.queries, g.method, g.source).top(3).sample_ids
        assert g.cardinality == len(np.unique(top)) / top.size
        often = [i for i in np.unique(top) if (top == i).sum() > 0.5 * len(top)]
        assert g.general_samples == len(often)


def test_errors_say_what_there_is(full: Any, tmp_path: Path) -> None:
    log, _, queries = full
    with pytest.raises(LogError, match="has no queries 'old'; it has new, training"):
        diffhook.influence(log, "old")
    with pytest.raises(ConfigurationError, match="no method 'treck'; there are adam-retrac, adam-tracin,"):
        diffhook.influence(log, "new", "treck")
    with pytest.raises(ConfigurationError, match="source is 'test'"):
        diffhook.influence(log, "new", source="test")
    with pytest.raises(LogError, match="has queries 'new' already"):
        diffhook.query(log, (queries + 1,), "new", OBJECTIVE, model=TinyDenoiser())
    with pytest.raises(LogError, match="cannot name a part of a log"):
        diffhook.query(log, (queries,), "../new", OBJECTIVE, model=TinyDenoiser())
    with pytest.raises(ConfigurationError, match="pass model="):
        diffhook.query(log, (queries,), "more", OBJECTIVE)
    with pytest.raises(ConfigurationError, match="not the one that was trained"):
        diffhook.query(log, (queries,), "more", OBJECTIVE, model=TinyDenoiser(channels=4))
    with pytest.raises(ConfigurationError, match=r"cannot take these queries.*\(3, 5, 8, 8\)"):
        diffhook.query(log, (torch.randn(3, 5, 8, 8),), "more", OBJECTIVE, model=TinyDenoiser())
    assert "more" not in log.queries
    train(tmp_path / "norms", projection_dim=0)
    norms = diffhook.open_log(tmp_path / "norms")
    assert len(diffhook.outliers(norms)) == 12
    with pytest.raises(LogError, match="captured with projection_dim=0"):
        diffhook.self_influence(norms)
    with pytest.raises(LogError, match="has no probe rows"):
        diffhook.self_influence(norms, source="probe")
