"""Sums by position, against np.add.at in float64: however many blocks a task has, wherever it runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import diffhook
from diffhook.analysis import grouped as module
from diffhook.analysis.cost import cost_of
from diffhook.analysis.execution import Execution
from diffhook.analysis.grouped import Division, add_rows, grouped
from diffhook.analysis.sample_sums import Whole
from diffhook.log import Block
from tests.analysis.synthetic import synthetic

COUNT, WIDTH = 40, 3
TREE, FILES = 1 << 30, 256  # bytes


@dataclass
class Rows:
    """A table of nothing but blocks, and the positions and values of their rows."""

    positions: list[np.ndarray]
    values: list[np.ndarray]
    name: str = "train"
    dim: int = 0
    groups: list[Any] = field(default_factory=list)

    def __len__(self) -> int:
        return sum(map(len, self.positions))

    def blocks(self) -> Any:
        return [Block(0, index, index + 1, index) for index in range(len(self.positions))]

    def sums(self, table: Any, block: Block) -> Any:
        return add_rows(self.positions[block.start], self.values[block.start])


def rows_of(kind: str, blocks: int = 11) -> Rows:
    rng = np.random.default_rng(blocks)
    positions = {
        "all in the first": lambda b: rng.permutation(COUNT) if b == 0 else rng.integers(0, COUNT, 25),
        "ever new ones": lambda b: rng.integers(3 * b, 3 * b + 9, 12),
        "far apart": lambda b: rng.choice([b, COUNT - 1 - b], 7),
        "some blocks empty": lambda b: rng.integers(0, COUNT, 0 if b % 3 == 0 else 9),
        "all blocks empty": lambda b: np.empty(0, np.int64),
    }[kind]
    found = [np.asarray(positions(block)) for block in range(blocks)]
    return Rows(found, [rng.standard_normal((len(p), WIDTH)).astype(np.float32) for p in found])


@pytest.mark.parametrize("memory", [TREE, FILES], ids=["tree", "files"])
@pytest.mark.parametrize("tasks", [1, 2, 4, 256])
@pytest.mark.parametrize(
    "kind",
    ["all in the first", "ever new ones", "far apart", "some blocks empty", "all blocks empty"],
)
def test_sums_are_those_of_a_loop_over_rows(
    monkeypatch: pytest.MonkeyPatch, kind: str, tasks: int, memory: int
) -> None:
    monkeypatch.setattr(module, "_TASKS", tasks)
    rows = rows_of(kind)
    expected = np.zeros((COUNT, WIDTH))
    for positions, values in zip(rows.positions, rows.values, strict=True):
        np.add.at(expected, positions, values.astype(np.float64))
    found = []
    for scheduler in ("synchronous", "threads"):
        execution = Execution(scheduler=scheduler, memory=memory)
        plan = Division.make(COUNT, WIDTH, execution)
        assert (plan.parts == 1) == (memory == TREE)
        table: Any = rows
        found.append(grouped(table, rows.sums, plan, Whole(), execution))
    np.testing.assert_allclose(found[0], expected, rtol=0, atol=1e-13 if memory == TREE else 1e-5)
    np.testing.assert_array_equal(found[0], found[1])


def test_tasks_are_as_many_whatever_runs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TASKS", 4)
    sizes = [len(run) for run in module._runs(rows_of("far apart", 18).blocks())]
    assert sizes == [5, 5, 5, 3]


def test_every_thread_has_partials_of_its_own() -> None:
    client = SimpleNamespace(scheduler_info=lambda: {"workers": {"a": {"nthreads": threads}}})
    empty: Any = Rows([], [])
    said = {}
    for threads in (1, 32):
        execution = Execution(client=client, memory=TREE)
        plan = Division.make(COUNT, WIDTH, execution)
        assert plan.parts == 1
        said[threads] = plan.memory(execution)
        assert cost_of(empty, plan, 0, 0, execution).memory == said[threads]
    assert said[32] - said[1] == 31 * 2 * COUNT * WIDTH * 8
    tight = Execution(client=client, memory=said[32] - 1)
    assert Division.make(COUNT, WIDTH, tight).parts > 1, "held whole, the sums take more than they may"


def test_spilled_sums_are_read_without_parsing_a_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """numpy parses .npy headers by ast.literal_eval, which CPython 3.11 does not survive in threads."""
    import ast

    def refuse(*arguments: Any) -> Any:
        raise AssertionError("a header was parsed")

    made = synthetic(tmp_path / "log")
    expected = diffhook.influence(made.log, "new", "trak").values, diffhook.near_duplicates(made.log, "train")
    monkeypatch.setattr(ast, "literal_eval", refuse)
    found = diffhook.influence(made.log, "new", "trak", execution=Execution(memory=512)).values
    # Sums in another order round by the size of their terms, also where these nearly cancel.
    np.testing.assert_allclose(found, expected[0], rtol=0, atol=1e-5 * np.abs(expected[0]).max())
    again = diffhook.near_duplicates(made.log, "train", execution=Execution(memory=512))
    np.testing.assert_array_equal(again.neighbours, expected[1].neighbours)
