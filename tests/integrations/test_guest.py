"""We change nothing, break nothing and leave nothing behind."""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import random
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator, data_loader
from torch.optim import optimizer
from torch.utils.data import DataLoader, TensorDataset

import diffhook
from diffhook.integrations.accelerate import DiffHook
from diffhook.integrations.torch import TorchHook
from tests.integrations.test_cases import OPTIMISERS
from tests.runs import TinyDenoiser, denoising_losses, identified


def _train(
    log: Path | None,
    *,
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
    model = TinyDenoiser()
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


class Traces:
    """What there is of us on an accelerator, a model, an optimiser, and anywhere."""

    def __init__(self) -> None:
        self.accelerator = Accelerator(cpu=True)
        self._plain = Accelerator(cpu=True)
        self.model = TinyDenoiser()
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1)
        self.loader = DataLoader(TensorDataset(identified()), 4)
        self._before = self._look()

    def _look(self) -> dict[str, Any]:
        loaders = (data_loader.DataLoaderShard, data_loader.DataLoaderDispatcher, data_loader.SkipDataLoader)
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        modules = self.model.modules()
        names = [thread.name for thread in threading.enumerate()]  # fsync: a pool that writes share
        return {
            "classes": [kind.__iter__ for kind in loaders],
            "accelerator": sorted(vars(self.accelerator)),
            "checkpoints": len(self.accelerator._save_model_state_pre_hook),
            "resuming": len(self.accelerator._load_model_state_pre_hook),
            "modules": [hook for m in modules for kind in kinds for hook in getattr(m, kind).values()],
            "parameters": [p.requires_grad for p in self.model.parameters()],
            "optimizer": sorted(vars(self.optimizer)),
            "steps": list(optimizer._global_optimizer_post_hooks.values()),
            "threads": sorted(name for name in names if name.startswith("diffhook-") and "fsync" not in name),
        }

    def assert_none(self) -> None:
        assert self._look() == self._before

    def assert_some(self) -> None:
        found = self._look()
        assert all(found[name] != self._before[name] for name in ("classes", "modules", "steps", "threads"))

    def prepare(self) -> None:
        """Once: the wrappers of accelerate are to stay."""
        self.model, _, _ = self.accelerator.prepare(self.model, self.optimizer, self.loader)

    def loop(self, *, fail_at: int | None = None) -> None:
        for index, (clean,) in enumerate(self.accelerator._dataloaders[-1]):
            batch = (clean, torch.randn_like(clean), torch.zeros(4).long())
            loss = denoising_losses(self.model, batch).mean()
            if index == fail_at:
                raise KeyError("the loop's own")
            self.accelerator.backward(loss)
            self.accelerator._optimizers[-1].step()
            self.accelerator._optimizers[-1].zero_grad()


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


@pytest.mark.parametrize("again", ["accelerator", "model"])
def test_after_an_error_the_next_hook_sees_the_last_one_off(tmp_path: Path, again: str) -> None:
    """A notebook's cell that makes the hook is run again."""
    traces = Traces()
    first = DiffHook(traces.accelerator, tmp_path / "log", strict=True)
    traces.prepare()
    with pytest.raises(KeyError):
        traces.loop(fail_at=2)
    traces.assert_some()
    second = DiffHook(
        traces.accelerator if again == "accelerator" else Accelerator(cpu=True),
        tmp_path / "other",
        strict=True,
    )
    assert first.closed == (again == "accelerator")
    second.accelerator.prepare(traces.model)
    assert first.closed
    second.close()
    traces.assert_none()
    log = diffhook.open_log(tmp_path / "log")
    assert log.train["sample"].tolist() == list(range(8)), "what the run had captured is kept"
    assert log.snapshots == [], "by now the weights may be others"


def test_a_second_run_into_the_same_log_sees_the_first_one_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A notebook's cell that makes everything anew is run again; the error kept the first alive."""
    monkeypatch.chdir(tmp_path)
    first, second = Traces(), Traces()
    kept = DiffHook(first.accelerator, "log", strict=True)
    first.prepare()
    with pytest.raises(KeyError):
        first.loop(fail_at=2)
    hook = DiffHook(second.accelerator, tmp_path / "log", strict=True)
    second.prepare()
    second.loop()
    assert kept.closed
    hook.close()
    kept.close()
    first.assert_none()
    log = diffhook.open_log(tmp_path / "log")
    assert log.train["sample"].tolist() == list(range(12)), "rows of the first run are superseded"
    assert log.verify() == []


def _steps(hook: TorchHook, model: Any, optimizer: Any, first: int, count: int = 3) -> None:
    """Of a loop that names its samples, each once."""
    for number in range(first, first + count):
        with hook.step(sample_ids=[number], timesteps=torch.zeros(1)):
            clean = identified()[:1]
            denoising_losses(model, (clean, torch.randn_like(clean), torch.zeros(1).long())).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_hook_that_a_newer_one_took_over_from_is_told_once_and_no_row_is_lost_or_doubled(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The first loop is gone on with afterwards, as in a notebook whose cells are run out of order."""
    first, second = TinyDenoiser(), TinyDenoiser()
    one, other = (torch.optim.SGD(model.parameters(), 0.1) for model in (first, second))
    earlier = TorchHook(tmp_path / "log", first, one)
    _steps(earlier, first, one, 0)
    newer = TorchHook(tmp_path / "log", second, other)
    assert not caplog.records
    _steps(newer, second, other, 100)
    (told,) = [r.message for r in caplog.records]
    assert f"taken over from the one that logged to {tmp_path / 'log'}" in told
    assert "captures nothing more; all its rows are kept" in told
    _steps(earlier, first, one, 3)
    earlier.flush()
    assert [r.message.partition(": ")[2] for r in caplog.records[1:]] == [
        "what the earlier one is given now is not logged"
    ]
    _steps(newer, second, other, 103)
    newer.close()
    earlier.close()
    assert len(caplog.records) == 2
    assert diffhook.open_log(tmp_path / "log").train["sample"].tolist() == list(range(100, 106))
    assert diffhook.open_log(tmp_path / "log", session=0).train["sample"].tolist() == [0, 1, 2]
    assert diffhook.open_log(tmp_path / "log").verify() == []


def test_rows_that_could_not_be_written_before_a_newer_hook_took_over_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = TinyDenoiser()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    hook = TorchHook(tmp_path / "log", model, optimizer)
    _steps(hook, model, optimizer, 0)
    hook.flush()
    shutil.rmtree(tmp_path / "log/train")
    TorchHook(tmp_path / "other", model, optimizer).close()
    assert hook.closed
    assert "its last rows are lost: writing to" in caplog.text


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
