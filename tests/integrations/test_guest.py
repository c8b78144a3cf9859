"""We change nothing, break nothing and leave nothing behind."""

from __future__ import annotations

import contextlib
import itertools
import logging
import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator, data_loader
from accelerate.utils import DistributedType
from torch.utils.data import DataLoader, TensorDataset

import diffhook
from diffhook.errors import ConfigurationError
from diffhook.integrations.accelerate import DiffHook
from tests.runs import TinyDenoiser, denoising_losses, identified


def _train(log: Path | None, *, at: Any = None, steps: int = 6, **options: Any) -> dict[str, Any]:
    """Everything that a run leaves: weights, optimiser state, all random states."""
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    if log is not None:
        DiffHook(accelerator, log, **options)
    model = TinyDenoiser()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
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


def test_a_run_is_bit_identical_with_and_without_us(tmp_path: Path) -> None:
    _assert_same(_train(tmp_path / "log", snapshot_every=2), _train(None))


def test_when_the_disk_fills_training_completes_and_it_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = _train(None)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    def fill(batch: int) -> None:
        if batch == 4:
            monkeypatch.setattr("diffhook.log.durable.DurableStore.write", fail)

    with caplog.at_level(logging.WARNING, "diffhook"):
        watched = _train(tmp_path / "log", at=fill, snapshot_every=1)
    _assert_told_once(caplog)
    assert "No space left on device" in caplog.text
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
    """One message when writing fails, and at most one when it is given up for good."""
    told = [record.msg for record in caplog.records]
    assert "training goes on" in caplog.records[0].getMessage()
    assert len(told) == len(set(told)) <= 2


def _hooked(model: torch.nn.Module) -> list[Any]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [hook for module in model.modules() for kind in kinds for hook in getattr(module, kind).values()]


@pytest.mark.parametrize("ending", ["end_training", "exception", "our own error"])
def test_nothing_of_ours_is_left(tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = (data_loader.DataLoaderShard, data_loader.DataLoaderDispatcher, data_loader.SkipDataLoader)
    iterators = [kind.__iter__ for kind in kinds]
    threads = {thread for thread in threading.enumerate() if thread.name == "diffhook-writer"}
    accelerator = Accelerator(cpu=True)
    before = dict(vars(accelerator))
    model = TinyDenoiser()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loader = DataLoader(TensorDataset(identified()), 4)
    if ending == "our own error":
        monkeypatch.setattr("diffhook.capture.Recorder.captured", None)

    def loop() -> None:
        with DiffHook(accelerator, tmp_path / "log", strict=True):
            prepared, stepper, batches = accelerator.prepare(model, optimizer, loader)
            for (clean,) in batches:
                batch = (clean, torch.randn_like(clean), torch.zeros(4).long())
                accelerator.backward(denoising_losses(prepared, batch).mean())
                stepper.step()
                if ending == "exception":
                    raise KeyError("the loop's own")
            accelerator.end_training()

    if ending == "end_training":
        loop()
    else:
        with pytest.raises(KeyError if ending == "exception" else TypeError):
            loop()
    assert [kind.__iter__ for kind in kinds] == iterators
    after = dict(vars(accelerator))
    for name in ("prepare", "backward", "log", "end_training"):
        assert name not in after
    assert after.keys() == before.keys()
    assert not accelerator._save_model_state_pre_hook
    assert not accelerator._load_model_state_pre_hook
    assert not _hooked(model)
    assert not optimizer._optimizer_step_post_hooks
    assert all(parameter.requires_grad for parameter in model.parameters())
    left = {thread for thread in threading.enumerate() if thread.name == "diffhook-writer"}
    assert left <= threads


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_sharded_parameters_are_refused_before_anything(tmp_path: Path, kind: Any) -> None:
    accelerator = Accelerator(cpu=True)
    accelerator.state.distributed_type, before = kind, accelerator.state.distributed_type
    try:
        with pytest.raises(ConfigurationError, match=f"{kind.value} shards parameters over processes"):
            DiffHook(accelerator, tmp_path / "log")
        DiffHook(accelerator, tmp_path / "log", enabled=False)
    finally:
        accelerator.state.distributed_type = before
    assert not (tmp_path / "log").exists()


def _compiled(model: torch.nn.Module) -> Any:
    return torch.compile(model, backend="eager")


def _in_place(model: torch.nn.Module) -> Any:
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize("compiled", [_compiled, _in_place], ids=["wrapped", "in place"])
def test_a_compiled_model_is_refused_in_one_sentence(tmp_path: Path, compiled: Any) -> None:
    accelerator = Accelerator(cpu=True)
    DiffHook(accelerator, tmp_path / "log")
    with pytest.raises(ConfigurationError, match="TinyDenoiser is compiled, and a compiled model"):
        accelerator.prepare(compiled(TinyDenoiser()))
    assert "prepare" not in vars(accelerator), "and nothing of ours is left"


@pytest.mark.parametrize("compiled", [_compiled, _in_place], ids=["wrapped", "in place"])
def test_a_model_compiled_after_prepare_is_refused_at_its_first_call(tmp_path: Path, compiled: Any) -> None:
    accelerator = Accelerator(cpu=True)
    DiffHook(accelerator, tmp_path / "log")
    model, loader = accelerator.prepare(TinyDenoiser(), DataLoader(TensorDataset(identified()), 4))
    model = compiled(model)
    for (clean,) in loader:
        with pytest.raises(ConfigurationError, match="TinyDenoiser is compiled, and a compiled model"):
            model(clean, torch.zeros(4).long())
        break
    assert not (tmp_path / "log").exists()
    assert model(clean, torch.zeros(4).long())[0].shape == clean.shape, "the model itself goes on"


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
