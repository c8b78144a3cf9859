"""We change nothing, break nothing and leave nothing behind."""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

import diffhook
from diffhook.integrations.accelerate import DiffHook
from diffhook.integrations.torch import TorchHook
from tests.integrations.test_cases import OPTIMISERS
from tests.integrations.traces import Traces
from tests.runs import TinyDenoiser, denoising_losses, identified, probed


def _train(
    log: Path | None,
    *,
    model_of: Any = TinyDenoiser,
    optimizer_of: Any = lambda p: torch.optim.AdamW(p, 1e-2),
    save: Path | None = None,
    at: Any = None,
    steps: int = 6,
    **options: Any,
) -> dict[str, Any]:
    """Everything that a run leaves: weights, optimiser state, all random states."""
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    if log is not None:
        DiffHook(accelerator, log, **options)
    model = model_of()
    optimizer = optimizer_of(model.parameters())
    loader = DataLoader(TensorDataset(identified(13)), 4, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for _ in range(steps // 2):
        for (clean,) in loader:
            if at is not None:
                at(len(losses))
            with accelerator.accumulate(model):
                batch = (clean, torch.randn_like(clean), torch.randint(0, 1000, (len(clean),)))
                loss = denoising_losses(model, batch).mean()
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
            if save is not None and len(losses) == 8:
                accelerator.save_state(str(save))
    accelerator.end_training()
    return {
        "losses": torch.stack(losses),
        "weights": [p.detach().clone() for p in model.parameters()],
        "optimizer": optimizer.state_dict()["state"],
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
    }


def _assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["python"] == expected["python"], "python's random numbers were consumed"
    assert found["numpy"] == expected["numpy"], "numpy's random numbers were consumed"
    for part in ("torch", "losses", "weights", "optimizer"):
        torch.testing.assert_close(found[part], expected[part], rtol=0, atol=0)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_run_is_bit_identical_with_and_without_us(tmp_path: Path, name: str) -> None:
    plain = _train(None, optimizer_of=OPTIMISERS[name])
    _assert_same(_train(tmp_path / "log", optimizer_of=OPTIMISERS[name], snapshot_every=2), plain)
    if name == "8-bit":
        assert "torch.uint8" in str(plain["optimizer"])


class Averaging(TinyDenoiser):
    """In evaluation mode it has averaged weights, as flow_matching's image example wraps its model."""

    def train(self, mode: bool = True) -> Averaging:
        if mode != self.training:
            for parameter in self.parameters():
                parameter.data.mul_(2 if mode else 0.5)
        return super().train(mode)  # type: ignore[return-value]


def test_a_model_that_changes_its_weights_for_evaluation_is_probed_as_it_is_trained(tmp_path: Path) -> None:
    plain = _train(None, model_of=Averaging)
    found = _train(tmp_path / "log", model_of=Averaging, snapshot_every=1, strict=True, **probed())
    _assert_same(found, plain)
    assert len(diffhook.open_log(tmp_path / "log").probe)


def test_when_the_disk_fills_training_completes_and_it_is_told_once(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = _train(None)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    def fill(batch: int) -> None:
        if batch == 4:
            monkeypatch.setattr("diffhook.log.durable.DurableStore.write", fail)

    with caplog.at_level(logging.INFO, "diffhook"):
        watched = _train(tmp_path / "log", save=tmp_path / "saved", at=fill, snapshot_every=1)
    _assert_told_once(caplog)
    assert "No space left on device" in caplog.text
    assert "No space left on device; rows written before are safe" in capsys.readouterr().out
    _assert_same(watched, plain)


def test_when_the_log_is_removed_training_completes_and_it_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = _train(None)

    def remove(batch: int) -> None:
        if batch == 4:
            for attempt in itertools.count():  # the writer may make the folder anew in between
                with contextlib.suppress(IsADirectoryError):
                    (tmp_path / "log").rename(tmp_path / f"elsewhere-{attempt}")
                    (tmp_path / "log").write_text("something else is here now")
                    return

    with caplog.at_level(logging.WARNING, "diffhook"):
        watched = _train(tmp_path / "log", at=remove, snapshot_every=1)
    _assert_told_once(caplog)
    _assert_same(watched, plain)


def _assert_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """When writing fails, and not again when it is given up for good."""
    (told,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "training goes on" in told


@pytest.mark.parametrize("ending", ["end_training", "exception", "our own error"])
def test_nothing_of_ours_is_left(tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    traces = Traces()
    if ending == "our own error":
        monkeypatch.setattr("diffhook.capture.Recorder.captured", None)

    def loop() -> None:
        with DiffHook(traces.accelerator, tmp_path / "log", strict=True):
            traces.prepare()
            traces.loop(fail_at=1 if ending == "exception" else None)
            traces.accelerator.end_training()

    if ending == "end_training":
        loop()
    else:
        with pytest.raises(KeyError if ending == "exception" else TypeError):
            loop()
    traces.assert_none()


def test_the_log_stays_where_it_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    traces = Traces()
    DiffHook(traces.accelerator, "log", strict=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    traces.prepare()
    traces.loop()
    traces.accelerator.end_training()
    assert len(diffhook.open_log(tmp_path / "log").train) == 12
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_what_others_put_over_ours_stays_and_what_fails_to_leave_keeps_nothing_else(tmp_path: Path) -> None:
    traces = Traces()
    hook = DiffHook(traces.accelerator, tmp_path / "log", strict=True)
    ours = traces.accelerator.backward
    seen = []

    def theirs(loss: Any, **kwargs: Any) -> None:
        seen.append(float(loss.detach()))
        ours(loss, **kwargs)

    traces.accelerator.backward = theirs
    traces.prepare()
    hook.capture.attachment.on_detach(lambda: 1 / 0)
    traces.loop()
    with pytest.raises(ZeroDivisionError):
        hook.close()
    assert traces.accelerator.backward is theirs
    count = len(seen)
    traces.loop()
    assert len(seen) == 2 * count
    del traces.accelerator.backward
    traces.assert_none()
    assert len(diffhook.open_log(tmp_path / "log").train) == 12


def test_two_hooks_on_two_models_of_one_loop_leave_in_any_order(tmp_path: Path) -> None:
    models = [TinyDenoiser(), TinyDenoiser()]
    optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in models]
    before = torch.autograd.backward, torch.Tensor.backward
    hooks = [TorchHook(tmp_path / str(i), models[i], optimizers[i]) for i in range(2)]
    clean = identified()[:4]
    batch = clean, torch.randn_like(clean), torch.randint(0, 1000, (4,))
    for _ in range(2):
        with hooks[0].step(sample_ids=range(4)), hooks[1].step(sample_ids=range(4)):
            sum(denoising_losses(model, batch).mean() for model in models).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    for hook in hooks:
        hook.close()
    assert (torch.autograd.backward, torch.Tensor.backward) == before
    assert [len(diffhook.open_log(tmp_path / str(i)).train) for i in range(2)] == [8, 8]


def test_an_interrupted_loop_may_go_on(tmp_path: Path) -> None:
    traces = Traces()
    DiffHook(traces.accelerator, tmp_path / "log", strict=True)
    traces.prepare()
    with pytest.raises(KeyError):
        traces.loop(fail_at=1)
    traces.loop()
    traces.accelerator.end_training()
    table = diffhook.open_log(tmp_path / "log").train
    assert table["sample"].tolist() == [*range(4), *range(12)]
    assert table["step"].tolist() == sorted([0, 1, 2, 3] * 4)
    traces.assert_none()


def test_an_accelerator_that_is_dropped_takes_its_hook_along(tmp_path: Path) -> None:
    """Whatever of the run is kept: model, optimiser and loader have no hold on us."""
    traces = Traces()
    DiffHook(traces.accelerator, tmp_path / "log", strict=True)
    traces.prepare()
    kept = traces.accelerator._dataloaders, traces.accelerator._optimizers
    with contextlib.suppress(KeyError):
        traces.loop(fail_at=2)
    gc.collect()
    traces.assert_some()
    traces.accelerator = traces._plain
    gc.collect()
    traces.assert_none()
    assert len(diffhook.open_log(tmp_path / "log").train) == 8
    del kept


def test_a_plain_loops_hook_that_is_dropped_leaves(tmp_path: Path) -> None:
    traces = Traces()
    hook = TorchHook(tmp_path / "log", traces.model, traces.optimizer, strict=True)
    with hook.step(sample_ids=range(4), timesteps=torch.zeros(4)):
        clean = identified()[:4]
        denoising_losses(traces.model, (clean, clean, torch.zeros(4).long())).mean().backward()
    traces.optimizer.step()
    del hook
    gc.collect()
    traces.assert_none()
    assert len(diffhook.open_log(tmp_path / "log").train) == 4


def test_a_step_without_a_captured_sample_counts(tmp_path: Path) -> None:
    """A regularising step between two of training."""
    accelerator = Accelerator(cpu=True)
    hook = DiffHook(accelerator, tmp_path / "log", strict=True, projection_dim=0)
    model = TinyDenoiser()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loader = DataLoader(TensorDataset(identified()), 4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for (clean,) in loader:
        batch = (clean, torch.randn_like(clean), torch.zeros(4).long())
        accelerator.backward(denoising_losses(model, batch).mean())
        optimizer.step()
        optimizer.zero_grad()
        accelerator.backward(sum(p.square().sum() for p in model.parameters()))
        optimizer.step()
        optimizer.zero_grad()
    assert hook.step_count == 6
    accelerator.end_training()
    table = diffhook.open_log(tmp_path / "log").train
    assert table["step"].tolist() == [0] * 4 + [2] * 4 + [4] * 4
    np.testing.assert_allclose(table["lr"], 0.1, rtol=1e-6)
