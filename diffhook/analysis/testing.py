"""What holds of every method and of every signal: tests for a class of your own to inherit.

    class TestMine(MethodContract):
        method = Mine

pytest runs them. The logs are of random rows; no model is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from diffhook.analysis.aggregation import Aggregation, summable_methods
from diffhook.analysis.execution import Execution
from diffhook.analysis.influence import influence
from diffhook.analysis.methods import METHODS, Method
from diffhook.analysis.signals import SIGNALS, Signal, View
from diffhook.analysis.tables import source_table
from diffhook.log import LogWriter, Rows, RunLog, Snapshot, open_log
from diffhook.log.compaction import compact
from diffhook.log.schema import BY_NAME, SCALARS
from diffhook.log.table_writer import TableWriter

_DIM, _STEPS, _TIMES = 16, (4, 8), (100.0, 500.0, 900.0)
_SAMPLES, _VISITS = np.array([2, 3, 5, 7, 11, 13, 17, 19]), 6


class MethodContract:
    """Set ``method``.

    Attributes:
        method: the class; registered.
    """

    method: ClassVar[type[Method]]

    def test_rows_are_weighed_one_by_one_by_the_columns_that_it_names(self) -> None:
        method, rows = METHODS[self.method.name], _events(np.random.default_rng(0))
        columns = {name: rows[name] for name in method.columns}
        whole = method.row_weights(columns)
        parts = slice(9), slice(9, None)
        halves = [{name: values[part] for name, values in columns.items()} for part in parts]
        np.testing.assert_array_equal(whole, np.concatenate([method.row_weights(half) for half in halves]))
        assert np.isfinite(whole).all()
        assert whole.any()

    def test_rows_without_a_usable_gradient_count_for_nothing(self) -> None:
        method, rows = METHODS[self.method.name], _events(np.random.default_rng(0))
        rows["grad_norm"][:4] = [np.nan, np.inf, 0, 1]
        rows["own_noise"][3] = 1
        weights = method.row_weights({name: rows[name] for name in method.columns})
        np.testing.assert_array_equal(weights[:4], 0)

    def test_queries_do_not_move_each_other(self, tmp_path: Path) -> None:
        log = random_log(tmp_path / "log", METHODS[self.method.name])
        among, alone = (influence(log, name, self.method.name, _source(log)) for name in ("three", "one"))
        np.testing.assert_allclose(alone.values[0], among.values[1], rtol=1e-4, atol=_least(among.values))

    def test_neither_memory_nor_threads_change_a_score(self, tmp_path: Path) -> None:
        log = random_log(tmp_path / "log", METHODS[self.method.name])
        ways = (Execution(), Execution(memory=1 << 9), Execution(scheduler="synchronous"))
        whole, parts, one = (
            influence(log, "three", self.method.name, _source(log), execution=way).values for way in ways
        )
        np.testing.assert_array_equal(one, whole)
        np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=_least(whole))
        assert np.isfinite(whole).all()
        assert np.ptp(whole) > 0, "all scores are equal"

    def test_rows_that_are_summed_up_beforehand_score_as_they_did(self, tmp_path: Path) -> None:
        """Or summing up is refused, as where rows are weighed by what a sum no longer has."""
        log, name = random_log(tmp_path / "log", METHODS[self.method.name]), self.method.name
        if not METHODS[name].summable:
            assert name not in summable_methods()
            return
        compact(log.location, tmp_path / "sums", aggregation=Aggregation(name), progress=False)
        whole, summed = (influence(found, "three", name) for found in (log, tmp_path / "sums"))
        np.testing.assert_allclose(summed.values, whole.values, rtol=1e-3, atol=_least(whole.values))


class SignalContract:
    """Set ``signal``; and ``log`` where a random log does not hold what it needs.

    Attributes:
        signal: the class; registered.
    """

    signal: ClassVar[type[Signal]]

    def log(self, folder: Path, order: Sequence[int] | None = None) -> RunLog:
        """A log in which the signal sees something, its events in an order."""
        return random_log(folder, order=order)

    def test_it_has_one_score_for_each_sample_and_reasons_for_some(self, tmp_path: Path) -> None:
        view = self._view(self.log(tmp_path / "log"))
        found = SIGNALS[self.signal.name].look(view)
        assert found is not None, "it says nothing of this log: give one of your own by log()"
        assert found.scores.shape == view.sample_ids.shape
        assert not np.isinf(found.scores).any()
        assert found.reasons.keys() <= set(range(len(view.sample_ids)))
        assert all(reason.kind and str(reason) for reason in found.reasons.values())

    def test_the_order_of_rows_changes_nothing(self, tmp_path: Path) -> None:
        count = len(_SAMPLES) * _VISITS
        orders = (None, np.random.default_rng(1).permutation(count).tolist())
        found_each = []
        for number, order in enumerate(orders):
            found = SIGNALS[self.signal.name].look(self._view(self.log(tmp_path / f"log-{number}", order)))
            assert found is not None
            found_each.append(found)
        np.testing.assert_allclose(found_each[1].scores, found_each[0].scores, rtol=1e-4, atol=1e-4)
        assert found_each[1].reasons.keys() == found_each[0].reasons.keys()

    def test_of_a_log_without_projections_it_says_nothing_or_what_it_can(self, tmp_path: Path) -> None:
        log = random_log(tmp_path / "log", projected=False)
        signal = SIGNALS[self.signal.name]
        if not signal.projected:
            signal.look(self._view(log))

    @staticmethod
    def _view(log: RunLog) -> View:
        return View(log, "train", source_table(log, "train", projected=False), Execution())


def random_log(
    path: Path, method: Method | None = None, order: Sequence[int] | None = None, projected: bool = True
) -> RunLog:
    """Eight samples, seen six times each, two snapshots, and the query sets "three" and "one", which is the
    second of the three. With a method for other gradients than the events', these in a set "training".

    Args:
        order: of the events.
    """
    rng, dim = np.random.default_rng(0), _DIM if projected else 0
    described: dict[str, Any] = {"kind": "diffusion", "measurement": "loss"}
    projection = {"dim": dim, "seed": 0, "kind": "sketch" if projected else "none"}
    identity = {
        "projection": projection, "parameters": [], "model": {"class": "none"}, "objective": described,
    }  # fmt: skip
    writer = LogWriter(path, {"identity": identity})
    events = _events(rng)
    chosen = slice(None) if order is None else np.asarray(order)
    writer.put("train", {name: values[chosen] for name, values in _kept(events, projected).items()})
    for step in _STEPS:
        writer.snapshot(Snapshot(step, 0.1, 0.4, writer.session), b"")
    writer.close()
    if projected:
        measurement = "loss" if method is None else method.measurement
        cells = [(q, step, t) for step in _STEPS for t in _TIMES for q in range(3)]
        asked = _rows(rng, cells)
        _ask(path, "three", asked, measurement, method)
        second = {name: values[asked["sample"] == 1] for name, values in asked.items()}
        _ask(path, "one", second, measurement, method)
        if measurement != "loss":
            grid = [(int(sample), step, t) for step in _STEPS for t in _TIMES for sample in _SAMPLES]
            _ask(path, "training", _rows(rng, grid), measurement, None)
    return open_log(path)


def _source(log: RunLog) -> str:
    return "training" if "training" in log.queries else "train"


def _least(values: Any) -> float:
    return 1e-5 * float(np.abs(values).max())


def _events(rng: np.random.Generator) -> dict[str, Any]:
    cells = [
        (int(sample), int(rng.integers(1, 9)), float(rng.integers(1, 1000)))
        for _ in range(_VISITS)
        for sample in rng.permutation(_SAMPLES)
    ]
    return _rows(rng, cells)


def _rows(rng: np.random.Generator, cells: Sequence[tuple[int, int, float]]) -> dict[str, Any]:
    """Rows whose samples have something in common with themselves."""
    sample, step, timestep = (np.array(column) for column in zip(*cells, strict=True))
    own = np.stack([np.random.default_rng(int(s)).standard_normal(_DIM) for s in sample])
    gradient = (own + rng.standard_normal(own.shape)) * (0.1 + timestep[:, None] / 300)
    norm = np.linalg.norm(gradient, axis=1)
    rows = {name: np.full(len(sample), BY_NAME[name].fill, BY_NAME[name].dtype) for name in SCALARS}
    known = {
        "sample": sample, "step": step, "timestep": timestep, "grad_norm": norm, "lr": 0.01 * (1 + step),
        "loss": rng.uniform(0.5, 2, len(sample)), "weight": np.full(len(sample), 0.25),
    }  # fmt: skip
    for name in ("input_mean", "input_contrast", "input_roughness"):
        known[name] = rng.uniform(0.1, 1, len(sample))
    rows.update({name: values.astype(BY_NAME[name].dtype) for name, values in known.items()})
    return {**rows, "projection": (gradient / norm[:, None]).astype(np.float16)}


def _kept(rows: Rows, projected: bool) -> Rows:
    return rows if projected else {name: values for name, values in rows.items() if name != "projection"}


def _ask(path: Path, name: str, rows: Rows, measurement: str, method: Method | None) -> None:
    """Write a query set, its rows twice: with the grid's noise, and with noise of their own."""
    writer = TableWriter(open_log(path).writable_store(), f"queries/{name}/rank-0000", _DIM, "float16")
    for own_noise in (0, 1):
        writer.append({**rows, "own_noise": np.full(len(rows["sample"]), own_noise, np.int8)})
    writer.flush()
    writer.describe({
        "objective": {"measurement": measurement},
        "grid": {"timesteps": list(_TIMES), "draws": 1, "seed": 0, "replicates": 1},
        "against": ["train", "probe"],
        "snapshots": [[step, 0] for step in _STEPS],
        "preconditioned": method is not None and method.preconditioned,
    })  # fmt: skip
