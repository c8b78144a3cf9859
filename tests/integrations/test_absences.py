"""Every micro-batch of a run is in the log, or counted in its summary under the reason why it is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import diffhook
from diffhook.capture import Recorder
from diffhook.capture.loop.run.summary import NO_BACKWARD
from diffhook.gradients.accumulator import PassAccumulator
from diffhook.integrations.torch import TorchHook
from tests.runs import TinyDenoiser, denoising_losses, identified

_MICRO_BATCHES, _PER_STEP = 8, 2


def _train(log: Path, at: Callable[[int, Tensor], bool] = lambda number, loss: True) -> dict[str, int]:
    """The reasons in the summary of a loop that does not send back every loss."""
    torch.manual_seed(0)
    model = TinyDenoiser()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    images = identified(4)
    with TorchHook(log, model, optimizer) as hook:
        for number in range(_MICRO_BATCHES):
            with hook.step(sample_ids=range(4)):
                batch = (images, torch.randn_like(images), torch.randint(0, 1000, (4,)))
                loss = denoising_losses(model, batch).mean()
                if at(number, loss):
                    loss.backward()
            if number % _PER_STEP:
                optimizer.step()
                optimizer.zero_grad()
    return json.loads(next(log.rglob("summary.json")).read_text())["left_out"]  # type: ignore[no-any-return]


def _once(method: Any, error: Exception) -> Any:
    """The method, but its third call fails."""
    calls = []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise error
        return method(*args, **kwargs)

    return failing


@pytest.mark.parametrize(
    ("owner", "name", "error", "reason", "lost"),
    [
        (PassAccumulator, "add_layer", MemoryError("no room"), "error: MemoryError", 1),
        (Recorder, "captured", KeyError("loss"), "error: KeyError", 1),
        (Recorder, "stepped", OSError("away"), "error: OSError", 2),
    ],
    ids=["hook", "row", "step"],
)
def test_what_an_error_of_ours_costs_is_counted_and_no_more_is_lost(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: type[Any],
    name: str,
    error: Exception,
    reason: str,
    lost: int,
) -> None:
    monkeypatch.setattr(owner, name, _once(getattr(owner, name), error))
    found = _train(tmp_path / "log")
    table = diffhook.open_log(tmp_path / "log").train
    assert found == {reason: lost}
    assert len(table) == 4 * (_MICRO_BATCHES - lost)
    assert max(table["step"].tolist()) == _MICRO_BATCHES // _PER_STEP - 1, (
        "steps go on to be counted as the loop takes them"
    )


def test_a_loss_that_is_not_sent_back_is_counted(tmp_path: Path) -> None:
    assert _train(tmp_path / "log", lambda number, _: number not in (2, 7)) == {"no-backward": 2}
    assert len(diffhook.open_log(tmp_path / "log").train) == 4 * (_MICRO_BATCHES - 2)


def test_a_backward_that_fails_in_the_loop_is_counted(tmp_path: Path) -> None:
    def fails(number: int, loss: Tensor) -> bool:
        if number == 3:
            with pytest.raises(RuntimeError, match="shape"):
                loss.backward(torch.ones(2))
        return number != 3

    assert _train(tmp_path / "log", fails) == {"failed-backward": 1}


def _losses(model: TinyDenoiser, images: Tensor) -> Tensor:
    return denoising_losses(model, (images, torch.randn_like(images), torch.randint(0, 1000, (4,))))


def test_a_run_without_a_row_says_why_where_nothing_was_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The loop is left after its first forward."""
    model = TinyDenoiser()
    loader = DataLoader([{"image": image, "id": i} for i, image in enumerate(identified(4))], 4)
    with TorchHook(tmp_path / "log", model, torch.optim.SGD(model.parameters(), 0.05), loader):
        for batch in loader:
            _losses(model, batch["image"])
            break
    shown = capsys.readouterr()
    assert NO_BACKWARD in shown.out + shown.err


def test_nothing_captured_since_a_checkpoint_was_loaded_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = TinyDenoiser()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    with TorchHook(tmp_path / "log", model, optimizer) as hook:
        with hook.step(sample_ids=range(4)):
            _losses(model, identified(4)).mean().backward()
        optimizer.step()
        hook.load_state_dict(hook.state_dict())
    assert "diffhook captured nothing since the checkpoint was loaded: " in caplog.text


@pytest.mark.parametrize(
    ("end", "failed"),
    [(FileNotFoundError("of the user's"), True), (SystemExit(2), True), (SystemExit(0), False)],
    ids=["error", "exit 2", "exit 0"],
)
def test_an_error_before_the_first_step_is_the_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, end: BaseException, failed: bool
) -> None:
    model = TinyDenoiser()
    with pytest.raises(type(end)), TorchHook(tmp_path / "log", model):
        raise end
    assert "diffhook captured nothing: " in caplog.text
    assert ("an error ended the script first" in caplog.text) == failed
