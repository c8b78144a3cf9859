"""The quick form of every experiment: it runs from nothing, and its table holds what it promises."""

from __future__ import annotations

import json
import math
import runpy
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import diffhook
from diffhook.capture.objective import Prediction
from diffhook.capture.objective.noise import noise_bank
from diffhook.gradients import PerSampleGradients
from tests.twins import relative_error, sample_gradients

EVIDENCE = Path(__file__).parents[2] / "examples" / "evidence"


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """(name, *seeds) → the result of an experiment's quick form; run here, for a process imports all anew."""
    monkeypatch.syspath_prepend(EVIDENCE)

    def run(name: str, *seeds: int) -> dict[str, Any]:
        named = ["--seeds", *map(str, seeds or (0,))]
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--quick", *named, "--out", str(tmp_path)])
        runpy.run_path(str(EVIDENCE / f"{name}.py"), run_name="__main__")
        assert (tmp_path / f"{name}.svg").read_text().startswith("<?xml")
        result: dict[str, Any] = json.loads((tmp_path / f"{name}.json").read_text())
        assert result["quick"]
        return result

    return run


def test_timestep_bias(quick: Callable[..., dict[str, Any]]) -> None:
    result = quick("bias")
    assert -1 <= result["correlation"]["mean"] <= 1
    methods = ("tracin", "retrac", "whitened-retrac")
    assert [(row["queries"], row["events"], row["method"]) for row in result["rows"]] == [
        *product(("held out", "generated"), ("replayed once", "replayed", "own"), methods)
    ]
    for row in result["rows"]:
        assert 1 / 8 <= row["cardinality"]["mean"] <= 1
        assert 0 <= row["own_label"]["mean"] <= 1
        assert 0 <= row["early"]["mean"] <= 1


def test_specificity(quick: Callable[..., dict[str, Any]]) -> None:
    rows = quick("specificity")["rows"]
    assert [row["source"] for row in rows] == [
        *["events"] * 5,
        *["probes"] * 5,
        *["a tenth"] * 5,
        "images",
        "labels",
    ]
    assert all(0 <= row["own_label"]["mean"] <= 1 for row in rows)


def test_own_pictures(quick: Callable[..., dict[str, Any]]) -> None:
    rows = quick("own_pictures")["rows"]
    assert [row["source"] for row in rows] == [*["events alone"] * 3, *["two plain lines"] * 3]
    assert all(1 <= row["median_rank"]["mean"] <= row["worst_rank"]["mean"] <= 26 for row in rows)


def test_tracing(quick: Callable[..., dict[str, Any]]) -> None:
    rows = quick("tracing")["rows"]
    assert len(rows) == 3 * (2 * 5 + 2)
    assert all(0 <= row["wrong"]["mean"] <= 1 for row in rows)
    of_training = {row["method"]: row["wrong"]["mean"] for row in rows if row["queries"] == "training"}
    assert of_training["pixels"] == 0  # the query itself comes first, and zeros look like no photograph


def test_outliers(quick: Callable[..., dict[str, Any]]) -> None:
    result = quick("outliers")
    kinds = {row["kind"] for row in result["rows"]}
    assert kinds == {"patches", "inverted", "noisy", "blank", "wrong label"}
    assert len(result["rows"]) == len(kinds) * 12 + 1, "labels are tried where the model is told them"
    found = {(row["kind"], row["method"]): row["auroc"]["mean"] for row in result["rows"]}
    assert found["inverted", "distance in pixels"] > 0.9
    assert found["inverted", "looks of the sample itself"] > 0.9


def test_linear_datamodeling_scores(quick: Callable[..., dict[str, Any]]) -> None:
    result = quick("lds", 0, 1)
    assert all(-1 <= row["mean"] <= 1 for row in result["rows"])
    assert len(result["ceilings"]) == 6
    for method in ("tracin", "retrac"):
        assert result["outside"][method] < 1e-4  # float32 sums of dattri's own gradients


class Weighted:
    """Predicts by the model alone, with a weight on every loss."""

    weight = 3.0

    def predict(self, model: nn.Module, batch: Tensor, timesteps: Tensor, noise_seeds: Tensor) -> Prediction:
        output = model(batch)
        return Prediction(output, torch.zeros_like(output), torch.full((len(batch),), self.weight).to(output))


def test_random_outputs_have_the_gauss_newton_matrix_as_their_gradients_second_moment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(EVIDENCE)
    from gauss_newton import RandomOutput, signs

    torch.manual_seed(0)
    model, count = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5)), 4000
    batch, seeds = torch.randn(1, 3).expand(count, 3).contiguous(), torch.arange(count)
    engine = PerSampleGradients(model, projection_dim="full")
    with engine:
        RandomOutput(Weighted())(model, batch, seeds, seeds).mean().backward()
    outputs = [sample_gradients(model, lambda twin, x, j=j: twin(x)[:, j], batch[:1])[0] for j in range(5)]
    jacobian, drawn = torch.stack(outputs), signs(seeds, torch.zeros(count, 5)).double()
    assert relative_error(engine.projections, (2 * Weighted.weight / 5) ** 0.5 * drawn @ jacobian) < 1e-4
    found = drawn.T @ drawn / count
    assert (found - torch.eye(5)).abs().max() < 5 / count**0.5, "signs are independent, so the moment is JᵀJ"
    noise = noise_bank(seeds, torch.zeros(count, 5)).double()
    assert (noise.T @ drawn / count).abs().max() < 5 / count**0.5, "and of the noise, too"


def test_replayed_events_are_gradients_at_the_snapshots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(EVIDENCE)
    from replay import replayed
    from sources import split, tiny_digits
    from training import LOSS, Recipe, make_model, train

    (training, asked), recipe = split(tiny_digits(), 6, 2, seed=0), Recipe(epochs=2, mlp=4).quick()
    train(training, recipe, seed=0, log=tmp_path / "log", progress=False)
    log, model = diffhook.open_log(tmp_path / "log"), make_model(training, recipe)
    diffhook.query(log, asked.batch(), "asked", LOSS, model=model, grid=diffhook.Grid(2), progress=False)
    found = replayed(log, training, model, tmp_path / "replayed", draws=2)
    sample, step, timestep, seed, norm = (
        found.train[name] for name in ("sample", "step", "timestep", "noise_seed", "grad_norm")
    )
    steps = [snapshot.step for snapshot in log.snapshots]
    assert sorted(zip(step.tolist(), sample.tolist(), strict=True)) == sorted([*product(steps, range(6))] * 2)
    assert len(np.unique(seed)) == len(np.unique(timestep)) == len(seed), "each row has a draw of its own"
    for snapshot in log.snapshots:
        model.load_state_dict(safetensors.torch.load(snapshot.parameters()))
        for row in np.flatnonzero(step == snapshot.step):
            drawn = torch.tensor([int(timestep[row])]), torch.tensor([int(seed[row])])
            alone = training.take([int(sample[row])]).batch()
            (gradient,) = sample_gradients(model, lambda twin, batch, d=drawn: LOSS(twin, batch, *d), alone)
            np.testing.assert_allclose(norm[row], float(gradient.norm()), rtol=1e-5)
    once = replayed(log, training, model, tmp_path / "once", draws=2, last=1).train
    at_end = np.flatnonzero(step == steps[-1])
    for name in ("sample", "step", "timestep", "grad_norm"):
        np.testing.assert_array_equal(once[name], found.train[name][at_end])
    scores = [diffhook.influence(each, "asked", "retrac").values for each in (found, log)]
    assert scores[0].shape == scores[1].shape == (2, 6)
    assert not np.allclose(*scores)


def test_counterfactual(quick: Callable[..., dict[str, Any]]) -> None:
    cases = quick("counterfactual")["cases"]
    for found in cases.values():
        assert all(math.isfinite(row["mean"]) for row in found["rows"])
        above = {row["method"]: row["above_random"]["mean"] for row in found["rows"]}
        assert above["at random"] == 0
    assert "siblings" in {row["method"] for row in cases["820 emoji"]["rows"]}


def test_ablations(quick: Callable[..., dict[str, Any]]) -> None:
    result = quick("ablations")
    for thing in ("timesteps", "noise draws", "D", "snapshots", "stride"):
        rows = [row for row in result["rows"] if row["thing"] == thing]
        assert {row["method"] for row in rows} == {"tracin", "retrac", "whitened-retrac"}
        best = (min if thing == "stride" else max)(row["value"] for row in rows)
        for row in rows:
            agreement = row["rank_agreement"]
            assert agreement == pytest.approx(1) if row["value"] == best else -1 <= agreement < 1


def test_what_a_sample_draws_does_not_change_when_others_are_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(EVIDENCE)
    import training
    from sources import split, tiny_digits

    samples, _ = split(tiny_digits(), 12, 2, seed=0)
    recipe = training.Recipe(epochs=3, batch=4, mlp=4, paired=True)
    drawn: dict[bytes, list[tuple[Tensor, Tensor]]] = {}
    loss = training._loss

    def noted(model: nn.Module, batch: dict[str, Tensor], noise: Tensor, timesteps: Tensor) -> Tensor:
        for image, own, timestep in zip(batch["images"], noise, timesteps, strict=True):
            drawn.setdefault(image.numpy().tobytes(), []).append((own, timestep))
        return loss(model, batch, noise, timesteps)

    monkeypatch.setattr(training, "_loss", noted)
    training.train(samples, recipe, seed=5, progress=False)
    with_all, drawn = drawn, {}
    training.train(samples, recipe, seed=5, ids=np.array([1, 4, 5, 8, 10]), progress=False)
    assert len(with_all) == 12
    assert len(drawn) == 5
    for image, draws in drawn.items():
        assert len({int(timestep) for _, timestep in draws}) > 1, "each visit has its own"
        for (noise, timestep), (other_noise, other_timestep) in zip(draws, with_all[image], strict=True):
            assert torch.equal(noise, other_noise)
            assert torch.equal(timestep, other_timestep)
