"""Every way to the same numbers gives them, and the choice between ways is measured and kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

from diffhook.gradients import PerSampleGradients
from diffhook.gradients.rules import ghost
from diffhook.gradients.tuning import Tuner
from tests.gradients.test_layers import CONV, TRANSPOSED, WIDE, WIDE_TRANSPOSED, squares
from tests.twins import projected, relative_error, sample_gradients

_NARROW = {**CONV, **{f"transposed-{name}": problem for name, problem in TRANSPOSED.items()}}
_WIDE = {**WIDE, **WIDE_TRANSPOSED}
_PRODUCT_ONLY = ("stride", "large-map", "groups", "wide-stride", "wide-groups")


def _force(monkeypatch: pytest.MonkeyPatch, name: str) -> set[str]:
    """Choose the named way wherever it is on offer; returns the set that will note what was on offer."""
    offered: set[str] = set()

    def choose(tuner: Tuner, key: str, ways: Mapping[str, Callable[[], object]]) -> str:
        offered.update(ways)
        return name if name in ways else next(iter(ways))

    monkeypatch.setattr(Tuner, "fastest", choose)
    return offered


@pytest.mark.parametrize("way", ["grouped", "looped", "columns"])
@pytest.mark.parametrize("name", _NARROW)
def test_every_way_of_a_convolution_equals_the_batch_1_loop(
    name: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    offered = _force(monkeypatch, way)
    layer, shape = _NARROW[name]
    batch = (torch.randn(shape),)
    engine = PerSampleGradients(layer, projection_dim="full")
    for _ in range(2):  # the first is checked, for which products are formed
        with engine:
            squares(layer, batch).mean().backward()
    assert way in offered
    assert relative_error(engine.projections, sample_gradients(layer, squares, batch)) < 1e-5


@pytest.mark.parametrize("way", ["ghost", "ghost, taps at once", "product"])
@pytest.mark.parametrize("name", [*_WIDE, "linear"])
def test_every_way_of_a_norm_equals_the_batch_1_loop(
    name: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    way, _, taps = way.partition(", ")
    if taps:  # as on a GPU
        monkeypatch.setattr(ghost, "tap_by_tap", ghost.all_taps)
    offered = _force(monkeypatch, way)
    layer, shape = _WIDE[name] if name in _WIDE else (nn.Linear(64, 48), (3, 7, 64))
    batch = (torch.randn(shape),)
    engine = PerSampleGradients(layer, projection_dim=0)
    for _ in range(2):  # the first is checked, for which products are formed
        with engine:
            squares(layer, batch).mean().backward()
    assert way in offered or name in _PRODUCT_ONLY, "Gram matrices cannot help these"
    expected = sample_gradients(layer, squares, batch).norm(dim=1, keepdim=True)
    assert relative_error(engine.norms[:, None], expected) < 1e-5


@pytest.mark.parametrize("dim", [2048, 300])
@pytest.mark.parametrize("way", ["ghost", "product"])
@pytest.mark.parametrize("tokens", [(), (1,), (7,), (3, 5)], ids=str)
@pytest.mark.parametrize(("inward", "outward"), [(64, 96), (256, 640), (600, 256), (300, 512), (48, 3)])
def test_every_way_of_a_matrix_is_projected_as_the_batch_1_loops_gradient(
    inward: int, outward: int, tokens: tuple[int, ...], way: str, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _force(monkeypatch, way)
    layer = nn.Linear(inward, outward, bias=False)
    batch = (torch.randn(5, *tokens, inward),)
    expected = sample_gradients(layer, squares, batch)
    engine = PerSampleGradients(layer, projection_dim=dim)
    for _ in range(2):  # the first is checked
        with engine:
            squares(layer, batch).mean().backward()
        assert relative_error(engine.projections, projected(engine.sketch, layer, expected)) < 1e-5
        assert relative_error(engine.norms[:, None], expected.norm(dim=1, keepdim=True)) < 1e-5


def test_the_fastest_way_is_measured_once_and_kept(tmp_path: Path) -> None:
    calls: list[str] = []
    spin = torch.randn(300, 300)

    def slow() -> None:
        calls.append("slow")
        for _ in range(20):
            spin @ spin

    ways = {"slow": slow, "fast": lambda: calls.append("fast")}
    path = tmp_path / "new folder" / "tuning.json"
    tuner = Tuner(path)
    assert tuner.fastest("some shape", ways) == "fast"
    measured = len(calls)
    assert tuner.fastest("some shape", ways) == "fast"
    assert Tuner(path).fastest("some shape", ways) == "fast"
    assert len(calls) == measured, "measured again"
    assert json.loads(path.read_text()) == {"some shape": "fast"}


def test_a_way_that_fails_is_not_chosen_and_a_broken_file_is_ignored(tmp_path: Path) -> None:
    def fails() -> None:
        raise RuntimeError("no kernel")

    path = tmp_path / "tuning.json"
    for content in ("{", "[1]", '{"shape": "gone"}'):
        path.write_text(content)
        assert Tuner(path).fastest("shape", {"fails": fails, "works": lambda: None}) == "works"


def test_what_another_process_has_chosen_stands(tmp_path: Path) -> None:
    path = tmp_path / "tuning.json"
    first, second = Tuner(path), Tuner(path)
    ways: dict[str, Callable[[], object]] = {"a": lambda: None, "b": lambda: None}
    second.fastest("another shape", ways)
    path.write_text(json.dumps({"shape": "b"}))
    del ways["b"]
    first.fastest("another shape", ways)
    ways["b"] = lambda: None
    assert first.fastest("shape", ways) == "b"
