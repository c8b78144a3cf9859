"""DiffHook in an ordinary Accelerate loop."""

from __future__ import annotations

import gc
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

import diffhook
from diffhook.errors import CaptureError, ConfigurationError, LogError
from diffhook.gradients import PerSampleGradients
from diffhook.integrations.accelerate import DiffHook
from tests.models import unet
from tests.runs import SCHEDULER, TinyDenoiser, denoising_losses, identified, train


def _rows(log: Path) -> dict[tuple[int, int], dict[str, Any]]:
    """(step, sample) → the row."""
    table = diffhook.open_log(log).train
    columns = {name: table[name] for name in table.columns}
    return {
        (int(columns["step"][i]), int(columns["sample"][i])): {n: c[i] for n, c in columns.items()}
        for i in range(len(table))
    }


@pytest.mark.parametrize(
    "options",
    [{}, {"accumulation": 2}, {"workers": 2}, {"count": 10}, {"batch_size": 1}],
    ids=["plain", "accumulation", "workers", "ragged", "batch-1"],
)
def test_rows_equal_the_batch_1_loop(tmp_path: Path, options: dict[str, Any]) -> None:
    run = train(tmp_path / "log", twin=True, projection_dim="full", **options)
    rows = _rows(tmp_path / "log")
    assert len(rows) == len(run.events)
    for event in run.events:
        row = rows[event.step, event.sample]
        norm = float(event.gradient.norm())
        assert row["timestep"] == event.timestep
        assert row["noise_seed"] == -1
        np.testing.assert_allclose(row["lr"], event.lr, rtol=1e-6)
        np.testing.assert_allclose(row["loss"], event.loss, rtol=1e-4)
        np.testing.assert_allclose(row["weight"], event.weight, rtol=1e-6)
        np.testing.assert_allclose(row["grad_norm"], norm, rtol=1e-5)
        error = np.linalg.norm(row["projection"] - (event.gradient / norm).numpy())
        assert error < 1e-5


@pytest.mark.parametrize("make_model", [TinyDenoiser, lambda: unet().model], ids=["tiny", "unet"])
def test_training_is_bit_identical_with_and_without_us(tmp_path: Path, make_model: Any) -> None:
    count = {"count": 12, "data": torch.randn(12, 1, 16, 16)}
    plain = train(None, make_model=make_model, **count)
    state = torch.random.get_rng_state()
    objective = diffhook.DiffusionObjective(SCHEDULER)
    probe = diffhook.Probe(samples=3, grid=diffhook.Grid(2, draws=2))
    watched = train(
        tmp_path / "log", make_model=make_model, objective=objective, probe=probe, snapshot_every=2, **count
    )
    assert torch.equal(torch.random.get_rng_state(), state), "random numbers were consumed"
    for before, after in zip(plain.model.parameters(), watched.model.parameters(), strict=True):
        assert torch.equal(before, after)


def test_every_second_step_is_captured_and_weighs_double(tmp_path: Path) -> None:
    run = train(tmp_path / "log", twin=True, every=2)
    rows = _rows(tmp_path / "log")
    expected = {(e.step, e.sample): e.weight for e in run.events if e.step % 2 == 0}
    assert rows.keys() == expected.keys()
    for key, weight in expected.items():
        np.testing.assert_allclose(rows[key]["weight"], 2 * weight, rtol=1e-6)


def test_an_overhead_budget_chooses_a_stride(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock on which a step takes 1 s, and a captured one 0.9 s more."""
    now = [0.0]
    finish = PerSampleGradients.finish

    def make_model() -> TinyDenoiser:
        model = TinyDenoiser()
        model.register_forward_hook(lambda *_: now.__setitem__(0, now[0] + 1.0))
        return model

    def costly_finish(engine: PerSampleGradients) -> None:
        now[0] += 0.9
        finish(engine)

    monkeypatch.setattr(
        "diffhook.capture.loop.steps.step_clock.time", SimpleNamespace(perf_counter=lambda: now[0])
    )
    monkeypatch.setattr(PerSampleGradients, "finish", costly_finish)
    train(tmp_path / "log", make_model=make_model, epochs=24, overhead=0.05, probe=False)
    told = "capturing one step in 20 from here: within 5% of the training time"
    assert told in capsys.readouterr().out
    steps = np.unique(diffhook.open_log(tmp_path / "log").train["step"])
    assert steps.tolist() == [0, 12, 24, 36, 48, 49, 69], "what capture usually costs, then what it does"


def test_the_plan_comes_first_and_the_measured_overhead_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "log", snapshot_every=4)
    out = capsys.readouterr().out
    fit = "capturing as many steps as fit into 5% of the training time"
    assert f"{fit}, and up to 2 min 30 s on top, 8 parameters" in out
    assert "12 rows" in out
    assert "36 rows, 3 snapshots; alerts: none" in out
    assert "capture added" in out
    assert "snapshots took" in out


def test_the_step_form_names_samples_itself(tmp_path: Path) -> None:
    """No prepared loader, no accelerator.backward."""
    accelerator = Accelerator(cpu=True)
    hook = DiffHook(accelerator, tmp_path / "log", strict=True)
    model = TinyDenoiser()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    data = identified()
    ids, timesteps = torch.tensor([7, 3, 11]), torch.tensor([1, 500, 999])
    with hook.step(sample_ids=ids, timesteps=timesteps):
        denoising_losses(model, (data[ids], torch.randn(3, 1, 8, 8), timesteps)).mean().backward()
    optimizer.step()
    hook.close()
    hook.close()
    train_rows = diffhook.open_log(tmp_path / "log").train
    assert train_rows["sample"].tolist() == [7, 3, 11]
    assert train_rows["timestep"].tolist() == [1, 500, 999]


def test_validation_forwards_and_skipped_batches_leave_no_rows(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    model, data = TinyDenoiser(), identified()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loader = DataLoader(TensorDataset(data), 4)
    with DiffHook(accelerator, tmp_path / "log", strict=True):
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        for index, (clean,) in enumerate(loader):
            if index == 0:
                continue  # as scripts do when they resume
            timesteps = torch.full((4,), 10 * index)
            batch = (clean, torch.randn_like(clean), timesteps)
            with torch.no_grad():
                denoising_losses(model, batch)
            accelerator.backward(denoising_losses(model, batch).mean())
            optimizer.step()
            with torch.no_grad():
                denoising_losses(model, batch)
    rows = diffhook.open_log(tmp_path / "log").train
    assert rows["sample"].tolist() == [4, 5, 6, 7, 8, 9, 10, 11]


def test_disabled_means_not_there(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    before = set(vars(accelerator))
    hook = DiffHook(accelerator, tmp_path / "log", enabled=False)
    assert set(vars(accelerator)) == before
    hook.close()
    assert not (tmp_path / "log").exists()


def test_another_configuration_in_the_same_folder_is_an_error_that_names_it(tmp_path: Path) -> None:
    train(tmp_path / "log", projection_dim=64)
    with pytest.raises(LogError, match=r"projection\.dim: the log has 64, this run 32"):
        train(tmp_path / "log", projection_dim=32, strict=False)


def test_a_second_run_in_the_same_folder_supersedes_the_first(tmp_path: Path) -> None:
    train(tmp_path / "log", epochs=3, snapshot_every=4)
    run = train(tmp_path / "log", epochs=2, snapshot_every=4, twin=True)
    assert len(_rows(tmp_path / "log")) == len(run.events) == len(diffhook.open_log(tmp_path / "log").train)
    assert [s.step for s in diffhook.open_log(tmp_path / "log").snapshots] == [4, 6]


def test_a_missing_timestep_says_what_to_do(tmp_path: Path) -> None:
    class Plain(torch.nn.Linear):
        pass

    accelerator = Accelerator(cpu=True)
    hook = DiffHook(accelerator, tmp_path / "log", strict=True)
    model = accelerator.prepare(Plain(3, 3))
    with pytest.raises(CaptureError, match="without a timestep"):
        with hook.step(sample_ids=[0, 1]):
            model(torch.ones(2, 3)).sum().backward()
    hook.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"projection_dim": -1}, "projection_dim is -1; expected"),
        ({"projection_dim": "Full"}, "projection_dim is 'Full'; expected"),
        ({"every": 0}, "every is 0; expected"),
        ({"overhead": 1.5}, "overhead is 1.5; expected a share"),
        ({"snapshot_every": 0}, "snapshot_every is 0; expected"),
        ({"workspace": 0}, "workspace is 0; expected a whole number from 1 on"),
    ],
)
def test_bad_options_say_what_was_expected(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        DiffHook(Accelerator(cpu=True), tmp_path / "log", **options)


def test_checkpoints_keep_snapshots_and_resuming_continues_the_log(tmp_path: Path) -> None:
    def session(epochs: int, resume: Path | None, save: Path | None) -> None:
        torch.manual_seed(0)
        accelerator = Accelerator(cpu=True)
        model, optimizer = TinyDenoiser(), None
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        hook = DiffHook(accelerator, tmp_path / "log", strict=True)
        loader = DataLoader(TensorDataset(identified()), 4)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        if resume:
            accelerator.load_state(str(resume))
        for epoch in range(epochs):
            for (clean,) in loader:
                batch = (clean, torch.randn_like(clean), torch.randint(0, 1000, (4,)))
                accelerator.backward(denoising_losses(model, batch).mean())
                optimizer.step()
                optimizer.zero_grad()
            if save and epoch == 0:
                accelerator.save_state(str(save))
        hook.close()

    session(2, None, tmp_path / "saved")
    assert sorted(np.unique(diffhook.open_log(tmp_path / "log").train["step"])) == [0, 1, 2, 3, 4, 5]
    session(2, tmp_path / "saved", None)
    log = diffhook.open_log(tmp_path / "log")
    steps, counts = np.unique(log.train["step"], return_counts=True)
    assert steps.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8], "steps 3 to 5 were taken again"
    assert (counts == 4).all(), "rows of a repeated step are counted once"
    assert [s.step for s in log.snapshots] == [3, 9]


def test_memory_of_a_pass_is_given_back(tmp_path: Path) -> None:
    def alive() -> int:
        gc.collect()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    train(tmp_path / "a")
    before = alive()
    train(tmp_path / "b", epochs=6)
    assert alive() <= before + 5
