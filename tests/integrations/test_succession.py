"""A newer hook sees an earlier one off: what that has captured is kept, and it is told once."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

import diffhook
from diffhook.integrations.accelerate import DiffHook
from diffhook.integrations.torch import TorchHook
from tests.integrations.traces import Traces
from tests.runs import TinyDenoiser, denoising_losses, identified


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
