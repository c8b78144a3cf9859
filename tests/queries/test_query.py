"""Queries: of which samples, against which model, and not twice."""

from __future__ import annotations

from collections import UserDict
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import safetensors.torch
import torch
from diffusers import DDIMScheduler
from torch import Tensor
from torch.utils.data import TensorDataset
from transformers import BatchEncoding

import diffhook
from diffhook.capture.objective import Objective
from diffhook.capture.objective.noise import noise_seed
from diffhook.errors import ConfigurationError, LogError
from diffhook.gradients import Sketch
from diffhook.queries.digest import digest
from tests.models import unet
from tests.runs import SCHEDULER, TinyDenoiser, identified, train

OBJECTIVE = diffhook.DiffusionObjective(SCHEDULER, weighting=diffhook.MinSNR(5.0))
GRID = diffhook.Grid([5, 600], draws=2, replicates=2)
IMAGES = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def log(tmp_path: Path) -> diffhook.RunLog:
    """A run whose scheduler never passed through Accelerate, and whose log records the loss."""
    probe = diffhook.Probe(1, diffhook.Grid(1))
    train(tmp_path / "log", snapshot_every=4, objective=OBJECTIVE, probe=probe, projection_dim=64)
    return diffhook.open_log(tmp_path / "log")


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts forward passes."""
    calls: list[int] = []
    forward = TinyDenoiser.forward

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(TinyDenoiser, "forward", counted)
    return calls


def ask(log: diffhook.RunLog, samples: Any = (IMAGES,), objective: Any = None, **options: Any) -> Any:
    options = {"model": TinyDenoiser(), "grid": GRID, **options}
    return diffhook.query(log, samples, "q", objective, **options)


def columns(table: Any) -> dict[str, np.ndarray]:
    return {name: table[name] for name in table.columns}


def test_the_log_brings_the_objective_back(log: diffhook.RunLog) -> None:
    recorded = columns(ask(log))
    given = columns(ask(log, objective=OBJECTIVE, overwrite=True))
    other = columns(ask(log, objective=diffhook.DiffusionObjective(SCHEDULER), overwrite=True))
    for name, values in recorded.items():
        np.testing.assert_array_equal(values, given[name], err_msg=name)
    assert not np.allclose(recorded["grad_norm"], other["grad_norm"]), "the weighting must count"


def test_every_query_has_a_row_per_snapshot_timestep_and_replicate(log: diffhook.RunLog) -> None:
    table = ask(log)
    keys = ("sample", "step", "timestep", "replicate", "own_noise", "noise_seed")
    rows = set(zip(*(table[c].tolist() for c in keys), strict=True))
    steps = [s.step for s in log.snapshots]
    assert rows == {
        (q, k, t, r, own, noise_seed(0, t, 2 * r, q if own else None))
        for q in range(3) for k in steps for t in (5, 600) for r in (0, 1) for own in (0, 1)
    }  # fmt: skip
    assert len(table) == len(rows)
    assert table.description["grid"] == {"timesteps": [5, 600], "draws": 2, "seed": 0, "replicates": 2}
    assert table.description["against"] == ["train", "probe"]


def test_the_same_question_is_not_computed_again(log: diffhook.RunLog, passes: list[int]) -> None:
    first = columns(ask(log))
    assert passes
    passes.clear()
    again = columns(ask(log))
    forced = columns(ask(log, overwrite=True))
    assert not passes
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
        np.testing.assert_array_equal(first[name], forced[name])


@pytest.mark.parametrize(
    "change",
    [
        {"samples": (IMAGES + 1e-6,)},
        {"samples": (IMAGES[:2],)},
        {"ids": [0, 2]},
        {"grid": diffhook.Grid([5, 600], draws=2, replicates=3)},
        {"objective": diffhook.DiffusionObjective(DDIMScheduler())},
        {"against": "probe"},
    ],
    ids=["pixels", "fewer", "ids", "grid", "objective", "against"],
)
def test_another_question_of_the_same_name_needs_overwrite(
    log: diffhook.RunLog, passes: list[int], change: dict[str, Any]
) -> None:
    ask(log)
    passes.clear()
    with pytest.raises(LogError, match=r"has queries 'q' already, from other .*: overwrite"):
        ask(log, **change)
    assert not passes
    ask(log, overwrite=True, **change)
    assert passes


def test_an_objective_with_functions_of_the_users_own_is_never_taken_for_the_same(
    log: diffhook.RunLog, passes: list[int]
) -> None:
    doubled = diffhook.DiffusionObjective(SCHEDULER, weighting=lambda t: torch.full((len(t),), 2.0))
    halved = diffhook.DiffusionObjective(SCHEDULER, weighting=lambda t: torch.full((len(t),), 0.5))
    first = columns(ask(log, objective=doubled))
    passes.clear()
    with pytest.raises(LogError, match=r"'q' already, and whether .* cannot be told: an objective"):
        ask(log, objective=halved)
    second = columns(ask(log, objective=halved, overwrite=True))
    np.testing.assert_allclose(first["grad_norm"], 4 * second["grad_norm"], rtol=1e-4)
    assert passes
    with pytest.raises(LogError, match="cannot be told"):
        ask(log)


@pytest.mark.parametrize("measurement", ["squared-output", "mean-output"])
def test_another_scalar_is_not_computed_again_either(
    log: diffhook.RunLog, passes: list[int], measurement: str
) -> None:
    first = columns(ask(log, objective=diffhook.Measured(OBJECTIVE, measurement)))
    passes.clear()
    again = columns(ask(log, objective=diffhook.Measured(OBJECTIVE, measurement)))
    assert not passes
    np.testing.assert_array_equal(first["grad_norm"], again["grad_norm"])
    with pytest.raises(LogError, match="from other samples, grid, objective or model"):
        ask(log)
    own = diffhook.DiffusionObjective(SCHEDULER, weighting=lambda t: torch.full((len(t),), 2.0))
    with pytest.raises(LogError, match="cannot be told"):
        ask(log, objective=diffhook.Measured(own, measurement))


def test_frozen_weights_are_part_of_the_question() -> None:
    model = TinyDenoiser()
    before = digest(model)
    model.time.weight.data += 1
    assert digest(model) == before, "trained parameters come from the snapshots"
    model.time.weight.requires_grad_(False)
    frozen = digest(model)
    model.time.weight.data += 1
    assert digest(model) != frozen


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.zeros(2), torch.zeros(2, 1)),
        (torch.zeros(2), torch.zeros(1, dtype=torch.float64)),
        ({"a": [1, 2]}, {"a": [1], "b": 2}),
        ([[1], [2]], [[1, 2]]),
        (["ab", "c"], ["a", "bc"]),
    ],
)
def test_digests_of_different_content_differ(one: Any, other: Any) -> None:
    assert digest(one) != digest(other)
    assert digest(one, other) == digest(one, other)


@pytest.mark.parametrize("dataset", [True, False], ids=["dataset", "tensor"])
def test_training_samples_are_asked_about_by_id(log: diffhook.RunLog, dataset: bool) -> None:
    data = identified()
    samples = TensorDataset(data) if dataset else data
    found = columns(ask(log, samples, ids=[7, 2]))
    whole = columns(ask(log, (data,), overwrite=True))
    assert set(found["sample"]) == {2, 7}
    for name in found:
        mine = np.concatenate([whole[name][whole["sample"] == i] for i in (2, 7)])
        order = np.argsort(found["sample"], kind="stable")
        np.testing.assert_allclose(found[name][order], mine, rtol=1e-3, atol=1e-3, err_msg=name)


@pytest.mark.parametrize("kind", [dict, UserDict, BatchEncoding])
def test_any_mapping_is_a_collated_batch(log: diffhook.RunLog, kind: Any) -> None:
    """Tokenisers give mappings that are no dicts; texts may come first."""
    plain = columns(ask(log, ids=[2, 0]))
    batch = kind({"captions": ["a", "b", "c"], "images": IMAGES})
    found = columns(ask(log, batch, ids=[2, 0], overwrite=True))
    for name, values in plain.items():
        np.testing.assert_array_equal(values, found[name], err_msg=name)
    assert set(columns(ask(log, batch, overwrite=True))["sample"]) == {0, 1, 2}
    wide = kind({"captions": ["a"], "images": torch.zeros(1, 2, 8, 8)})
    with pytest.raises(ConfigurationError, match=r"captions.*str.*images.*shape \(1, 2, 8, 8\)"):
        ask(log, wide, overwrite=True)


def test_a_model_that_was_lost_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = tmp_path / "log"

    def lost() -> TinyDenoiser:
        model = TinyDenoiser()
        torch.nn.init.constant_(model.inward.bias, torch.nan)
        return model

    train(log, make_model=lost, epochs=1, projection_dim=64, alerts=())
    caplog.clear()
    ask(diffhook.open_log(log), objective=OBJECTIVE)
    assert "12 of the 12 gradients of queries 'q' are not finite" in caplog.text
    assert "all scores of 0, 1, 2 are 0" in caplog.text


def test_queries_on_another_scale_are_told(log: diffhook.RunLog, caplog: pytest.LogCaptureFixture) -> None:
    ask(log)
    assert "contrast" not in caplog.text
    ask(log, (127.5 * (IMAGES + 1),), overwrite=True)
    assert "the queries have a contrast (standard deviation) of 1" in caplog.text
    assert "scale them as the training's samples were" in caplog.text


@pytest.mark.parametrize("samples", [PIL.Image.new("RGB", (8, 8)), [PIL.Image.new("L", (8, 8))]])
def test_pictures_that_are_no_tensors_are_refused(log: diffhook.RunLog, samples: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"of type Image: expected a \(Q, …\) tensor"):
        ask(log, samples)


def test_what_cannot_be_asked_is_named(log: diffhook.RunLog) -> None:
    with pytest.raises(ConfigurationError, match=r"query ids \[12, 99\] are not among the 12 samples"):
        ask(log, identified(), ids=[3, 12, 99])
    with pytest.raises(ConfigurationError, match="is named more than once"):
        ask(log, identified(), ids=[3, 3])
    for nothing in ((torch.zeros(0, 1, 8, 8),), [], {}):
        with pytest.raises(ConfigurationError, match="there are no samples to query"):
            ask(log, nothing)
    with pytest.raises(ConfigurationError, match=r"samples are uint8, from 0 to 255; expected floats as"):
        ask(log, (torch.tensor([0, 255], dtype=torch.uint8).repeat(32).reshape(1, 1, 8, 8),))
    with pytest.raises(LogError, match=r"no snapshot of step 5; it has 4, 8, 9"):
        diffhook.generate(log, 1, model=TinyDenoiser(), step=5)
    with pytest.raises(ConfigurationError, match="0 samples in 50 denoising steps"):
        diffhook.generate(log, 0)
    with pytest.raises(ConfigurationError, match="50 denoising steps, 0 at once; expected at least 1"):
        diffhook.generate(log, 1, batch_size=0)
    with pytest.raises(ConfigurationError, match="TinyDenoiser does not say what it samples"):
        diffhook.generate(log, 1, model=TinyDenoiser())


def test_generated_samples_come_from_the_snapshot_and_their_seeds(tmp_path: Path) -> None:
    data = torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    objective = diffhook.DiffusionObjective(DDIMScheduler())
    probe = diffhook.Probe(1, diffhook.Grid(1))
    run = train(
        tmp_path / "log", make_model=lambda: unet().model, data=data, objective=objective, probe=probe,
        snapshot_every=2, epochs=2, projection_dim=64,
    )  # fmt: skip
    log = diffhook.open_log(tmp_path / "log")
    made = diffhook.generate(log, 3, seed=7, steps=4)
    torch.testing.assert_close(made.batch["latents"], direct_ddim(run.model, [7, 8, 9]), rtol=1e-3, atol=1e-4)
    assert made.details == {"seeds": [7, 8, 9], "denoising_steps": 4, "snapshot": [4, 0]}
    other = diffhook.generate(log, 3, seed=7, steps=4, step=2)
    assert not torch.allclose(made.images, other.images)
    table = diffhook.query(log, made.batch, "made", grid=diffhook.Grid(1), details=made.details)
    assert table.description["samples"] == made.details


class Unlucky(Objective):
    """An objective that fails in the midst of its work."""

    num_timesteps = 1000

    def __call__(self, *arguments: Any) -> Tensor:
        raise ArithmeticError("no such luck")

    def describe(self) -> dict[str, Any]:
        return {"kind": "unlucky"}


def test_a_live_model_keeps_its_weights_mode_and_gradients(tmp_path: Path) -> None:
    data = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    objective = diffhook.DiffusionObjective(DDIMScheduler())
    train(tmp_path / "log", make_model=lambda: unet().model, data=data, epochs=1, projection_dim=64)
    log = diffhook.open_log(tmp_path / "log")
    model = unet().model.train()
    own = {name: value.clone() for name, value in model.state_dict().items()}
    asked: dict[str, Any] = {"model": model, "objective": objective}
    diffhook.query(log, data[:1], "q", grid=diffhook.Grid(1), **asked)
    diffhook.generate(log, 1, steps=1, **asked)
    with pytest.raises(ArithmeticError, match="no such luck"):
        diffhook.query(log, data[:1], "other", Unlucky(), model=model)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, own[name]), name


@torch.no_grad()
def direct_ddim(model: torch.nn.Module, seeds: list[int]) -> Tensor:
    """The deterministic sampler written out (arXiv 2010.02502, η = 0), with diffusers' clipping."""
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
    found = []
    for seed in seeds:
        x = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(seed))
        for t in (750, 500, 250, 0):
            noise = model.eval()(x, t).sample
            clean = ((x - (1 - kept[t]).sqrt() * noise) / kept[t].sqrt()).clamp(-1, 1)
            before = kept[t - 250] if t else torch.tensor(1.0)
            x = before.sqrt() * clean + (1 - before).sqrt() * noise
        found.append(x)
    return torch.cat(found)


def test_projections_of_another_version_are_neither_joined_nor_queried(
    log: diffhook.RunLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sketch, "VERSION", Sketch.VERSION + 1)
    with pytest.raises(LogError, match=r"has projections of version \d, and this diffhook makes version \d"):
        ask(log)
    with pytest.raises(LogError, match=r"projection\.version: the log has"):
        train(tmp_path / "log", snapshot_every=4, objective=OBJECTIVE, projection_dim=64, strict=True)


def test_a_log_of_chosen_layers_is_queried_over_those_and_its_snapshots_hold_the_rest(tmp_path: Path) -> None:
    options: Any = {"snapshot_every": 4, "objective": OBJECTIVE, "projection_dim": "full"}
    run = train(tmp_path / "log", layers=["inward", "time"], twin=True, **options)
    log = diffhook.open_log(tmp_path / "log")
    parameters = dict(run.model.named_parameters())
    names = [name for name, _ in log.config["identity"]["parameters"]]
    assert names == ["time.weight", "time.bias", "inward.weight", "inward.bias"]
    count = sum(parameters[name].numel() for name in names)
    norms = {(e.sample, e.step): float(e.gradient[:count].norm()) for e in run.events}
    for sample, step, norm in zip(
        *(log.train[c].tolist() for c in ("sample", "step", "grad_norm")), strict=True
    ):
        assert norm == pytest.approx(norms[sample, step], rel=1e-4)
    assert set(safetensors.torch.load(log.snapshots[-1].parameters())) == set(parameters)
    assert ask(log).dim == count
    with pytest.raises(LogError, match="layers: the log has"):
        train(tmp_path / "log", layers=["inward"], **options)
