"""Backwards that are more, or less, than one loss of one forward, and gradients that the loop throws away."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import diffhook
from tests.integrations.watched import Watched
from tests.runs import denoising_losses


def _none(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None


THROWN: dict[str, Callable[[nn.Module], object]] = {
    "model.zero_grad": lambda model: model.zero_grad(),
    "zeros": lambda model: model.zero_grad(set_to_none=False),
    "None": _none,
    "foreach": lambda model: torch._foreach_zero_([p.grad for p in model.parameters() if p.grad is not None]),
}


@pytest.mark.parametrize("same_batch", [True, False])
@pytest.mark.parametrize("name", THROWN)
def test_gradients_that_the_loop_throws_away_itself_moved_nothing(
    tmp_path: Path, name: str, same_batch: bool
) -> None:
    loop = Watched(tmp_path / "log").prepare()
    for number, (clean,) in enumerate(loop.loader):
        for kept in (False, True) if same_batch else (number != 1,):
            batch = loop.batch(clean)
            loop.accelerator.backward(denoising_losses(loop.model, batch).mean())
            if kept:
                loop.step()
            else:
                THROWN[name](loop.model)
    loop.accelerator.end_training()
    table = diffhook.open_log(tmp_path / "log").train
    rate = float(np.float32(0.01))
    expected = ([0.0] * 4 + [rate] * 4) * 3 if same_batch else [rate] * 4 + [0.0] * 4 + [rate] * 4
    assert table["lr"].tolist() == expected


def test_a_gradient_that_was_clipped_is_no_thrown_away_one(tmp_path: Path) -> None:
    loop = Watched(tmp_path / "log").prepare()
    for number, (clean,) in enumerate(loop.loader):
        batch = loop.batch(clean)
        loop.note(batch)
        loop.accelerator.backward(denoising_losses(loop.model, batch).mean())
        torch.nn.utils.clip_grad_norm_(loop.model.parameters(), 0.1)
        if number:
            loop.step()
    assert set(loop.assert_rows()["lr"].tolist()) == {float(np.float32(0.01))}


def _each_row(losses: Tensor) -> None:
    for row, loss in enumerate(losses / len(losses)):
        loss.backward(retain_graph=row + 1 < len(losses))


def _halves(losses: Tensor) -> None:
    losses[:2].mean().backward(retain_graph=True)
    losses[2:].mean().backward()


@pytest.mark.parametrize("backward", [_each_row, _halves])
def test_several_backwards_of_one_forward_are_left_out_and_told(
    tmp_path: Path, backward: Callable[[Tensor], None], caplog: pytest.LogCaptureFixture
) -> None:
    loop = Watched(tmp_path / "log").prepare()
    for number, (clean,) in enumerate(loop.loader):
        batch = loop.batch(clean)
        if number == 1:
            backward(denoising_losses(loop.model, batch))
        else:
            loop.note(batch)
            loop.accelerator.backward(denoising_losses(loop.model, batch).mean())
        loop.step()
    loop.assert_rows()
    assert caplog.text.count("several backwards go through one forward") == 1


def test_a_backward_for_some_of_the_parameters_is_left_out_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loop = Watched(tmp_path / "log").prepare()
    for number, (clean,) in enumerate(loop.loader):
        batch = loop.batch(clean)
        asked = [*loop.model.parameters()][: 2 if number == 1 else None]
        if number != 1:
            loop.note(batch)
        denoising_losses(loop.model, batch).mean().backward(inputs=asked)
        loop.step()
    loop.assert_rows()
    assert caplog.text.count("gradients of some of the trained parameters only") == 1


@pytest.mark.parametrize("each", [1.0, 0.25])
def test_a_loss_for_each_row_may_be_sent_back_with_a_gradient(tmp_path: Path, each: float) -> None:
    loop = Watched(tmp_path / "log").prepare()
    for (clean,) in loop.loader:
        batch = loop.batch(clean)
        loop.note(batch)
        losses = denoising_losses(loop.model, batch)
        losses.backward(torch.full_like(losses, each))
        loop.step()
    np.testing.assert_allclose(loop.assert_rows()["weight"], each)


def test_a_hook_that_is_put_on_a_parameter_is_noticed_at_once(tmp_path: Path) -> None:
    """The parameter is left out then, from the batch after the one that shows it."""
    loop = Watched(tmp_path / "log").prepare().epoch()
    loop.model.inward.weight.register_hook(lambda gradient: gradient / 10)
    shown = loop.steps
    with pytest.warns(UserWarning, match="a hook on the parameter changes the gradient"):
        loop.epoch()
    loop.accelerator.end_training()
    table = diffhook.open_log(tmp_path / "log").train
    for step, sample, norm in zip(table["step"], table["sample"], table["grad_norm"], strict=True):
        whole = loop.expected[int(step), int(sample)]
        assert step != shown
        assert norm < whole if step > shown else norm == pytest.approx(whole, rel=1e-5)
