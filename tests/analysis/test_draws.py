"""Error bars: from draws on both sides, and of a width that holds what other draws would have given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import diffhook
from diffhook.analysis.execution import Execution
from diffhook.analysis.methods import TRAK
from diffhook.analysis.sample_sums import sample_sums
from diffhook.log import LogWriter, Snapshot
from diffhook.log.table_writer import TableWriter
from tests.analysis.formulas import feature, nearest_step, query_direction
from tests.analysis.synthetic import DIM, SAMPLES, STEPS, Synthetic, config, synthetic

TIMES = (100.0, 500.0, 900.0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Synthetic:
    return synthetic(tmp_path_factory.mktemp("draws") / "log")


@pytest.mark.parametrize("memory", [1 << 30, 512], ids=["whole", "in parts"])
def test_errors_on_events_add_the_scatter_of_rows_to_the_queries_jackknife(
    made: Synthetic, memory: int
) -> None:
    found = diffhook.influence(made.log, "new", "tracin", "train", execution=Execution(memory=memory))
    columns = {name: values.tolist() for name, values in made.train.columns.items()}
    variance = np.zeros((4, len(SAMPLES)))
    for i, sample in enumerate(SAMPLES):
        for q in range(4):
            without = np.zeros(3)
            for step in STEPS:
                mine = [
                    r for r in range(len(made.train))
                    if columns["sample"][r] == sample and nearest_step(columns["step"][r]) == step
                ]  # fmt: skip
                rate = np.array([columns["lr"][r] * columns["weight"][r] for r in mine])
                products = np.array([made.train.gradient[r] for r in mine])
                whole = rate * (products @ query_direction(made.queries["new"], q, step, "tracin", [0, 1, 2]))
                variance[q, i] += len(mine) * whole.var(ddof=1)
                for gone in range(3):
                    kept = [r for r in range(3) if r != gone]
                    asked = query_direction(made.queries["new"], q, step, "tracin", kept)
                    without[gone] += (rate * (products @ asked)).sum()
            variance[q, i] += np.square(without - without.mean()).sum() * 2 / 3
    assert found.errors is not None
    np.testing.assert_allclose(found.errors, np.sqrt(variance), rtol=2e-3)


def test_whitening_lets_through_what_the_leverage_leaves(made: Synthetic) -> None:
    """Of the samples' mean leverage, the trace of the hat matrix over their number."""
    found = diffhook.influence(made.log, "new", "trak", "train")
    method = TRAK()
    rows = found._pass.rows
    sums = sample_sums(made.log, made.log.train, method, rows.sample_ids, rows.steps, Execution())
    share = method.variance_share(sums, len(STEPS))
    for k, step in enumerate(STEPS):
        means = np.array([feature(made.train, s, step, "trak") for s in SAMPLES])
        gram = means.T @ means
        kernel = np.linalg.inv(gram + 0.1 * np.trace(gram) / DIM * np.eye(DIM))
        assert share[k] == pytest.approx(1 - np.trace(means @ kernel @ means.T) / len(SAMPLES), rel=1e-4)


def test_a_single_row_tells_nothing_and_is_within_noise(tmp_path: Path) -> None:
    made = synthetic(tmp_path / "log", replicates=1, visits=1)
    found = diffhook.influence(made.log, "new", "retrac", "train")
    assert found.errors is not None
    assert np.isnan(found.errors).all()
    certainty = found.certainty(found.top(2))
    assert certainty is not None
    assert not certainty.beyond.any()
    assert certainty.stability is None


# ── coverage: fresh draws of the same samples and queries ─────────────────────────────────────────

QUERIES, RUNS = 4, 40


class World:
    """Samples and queries whose gradients are a direction of their own and noise, drawn anew at will."""

    def __init__(self, count: int = 12) -> None:
        rng = np.random.default_rng(5)
        self.count = count
        self.own = rng.standard_normal((count, DIM)) / DIM**0.5
        self.asked = self.own[:QUERIES] + 0.5 * rng.standard_normal((QUERIES, DIM)) / DIM**0.5

    def rows(
        self, rng: np.random.Generator, means: Any, cells: Any, weight: float, shift: Any = 0.0
    ) -> dict[str, Any]:
        sample, step, timestep, replicate = (np.array(column) for column in zip(*cells, strict=True))
        gradient = means[sample] + rng.standard_normal((len(sample), DIM)) / DIM**0.5 + shift
        norm = np.linalg.norm(gradient, axis=1)
        ones = np.ones(len(sample), np.float32)
        return {
            "sample": sample, "step": step, "timestep": timestep.astype(np.float32), "noise_seed": replicate,
            "replicate": replicate.astype(np.int16), "lr": ones, "loss": ones, "weight": weight * ones,
            "grad_norm": norm.astype(np.float32),
            "projection": (gradient / norm[:, None]).astype(np.float32),
        }  # fmt: skip

    def on_grid(self, path: Path, rng: np.random.Generator, method: str) -> diffhook.analysis.Scores:
        """Of new draws that both sides share, the default's ten timesteps with two replicates."""
        cells = [(s, 100.0 * t, r) for s in (3, 12) for t in range(10) for r in range(2)]
        common = {cell: rng.standard_normal(DIM) / DIM**0.5 for cell in cells}

        def made(means: Any) -> dict[str, Any]:
            rows = [(i, *cell) for cell in cells for i in range(len(means))]
            shift = np.array([common[s, t, r] for _, s, t, r in rows])
            return self.rows(rng, means, rows, 1 / 20, shift)

        described = {**config(), "probe": {"grid": {"timesteps": 10, "replicates": 2}}}
        writer = LogWriter(path, described)
        writer.put("train", self.rows(rng, self.own, [(i, 3, 0.0, 0) for i in range(self.count)], 1.0))
        writer.put("probe", made(self.own))
        for step in (3, 12):
            writer.snapshot(Snapshot(step, 0.1, 0.4, writer.session), b"")
        writer.close()
        log = diffhook.open_log(path)
        queries = TableWriter(log.writable_store(), "queries/q/rank-0000", DIM, "float32")
        queries.append(made(self.asked))
        queries.flush()
        described = {"objective": {}, "snapshots": [[3, 0], [12, 0]], "against": ["probe"]}
        queries.describe({**described, "grid": {"timesteps": 10, "replicates": 2}})
        return diffhook.influence(
            diffhook.open_log(path), "q", method, "probe", execution=Execution(scheduler="synchronous")
        )

    def scores(self, path: Path, rng: np.random.Generator, method: str) -> diffhook.analysis.Scores:
        """Of new draws on both sides, sixteen events a sample and eight replicates of the queries' noise."""
        events = [(i, step, 0.0, 0) for step in range(16) for i in range(self.count)]
        asked = [(q, s, t, r) for s in (3, 12) for t in TIMES for r in range(8) for q in range(QUERIES)]
        writer = LogWriter(path, config())
        writer.put("train", self.rows(rng, self.own, events, 1.0))
        for step in (3, 12):
            writer.snapshot(Snapshot(step, 0.1, 0.4, writer.session), b"")
        writer.close()
        log = diffhook.open_log(path)
        queries = TableWriter(log.writable_store(), "queries/q/rank-0000", DIM, "float32")
        rows = self.rows(rng, self.asked, asked, 1 / (len(TIMES) * 8))
        queries.append({**rows, "own_noise": np.ones(len(asked), np.int8)})
        queries.flush()
        queries.describe({"objective": {}, "snapshots": [[3, 0], [12, 0]], "against": ["train"]})
        return diffhook.influence(
            diffhook.open_log(path), "q", method, "train", execution=Execution(scheduler="synchronous")
        )


@pytest.mark.parametrize(
    ("rows", "method", "samples"),
    [
        ("events", "tracin", 12), ("events", "retrac", 12), ("events", "whitened-retrac", 80),
        ("grid", "tracin", 12), ("grid", "retrac", 12), ("grid", "whitened-retrac", 80),
    ],
)  # fmt: skip
def test_intervals_hold_the_mean_of_fresh_draws_in_95_of_100(
    tmp_path: Path, rows: str, method: str, samples: int
) -> None:
    world, rng = World(samples), np.random.default_rng(1)
    drawn = world.scores if rows == "events" else world.on_grid
    found = [drawn(tmp_path / str(run), rng, method) for run in range(RUNS)]
    values = np.array([each.values for each in found])
    margins = np.array([each.margins for each in found])
    others = (values.sum(0) - values) / (RUNS - 1)  # the mean of the other runs: its own error is small
    share = (np.abs(values - others) < margins * np.sqrt(1 + 1 / (RUNS - 1))).mean()
    assert 0.93 <= share <= 0.97, f"{share:.3f} of {values.size} intervals hold what fresh draws give"
