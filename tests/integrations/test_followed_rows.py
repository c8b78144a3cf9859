"""Loops that train on other rows than the last batch's: each row is right, or left out and told."""

from __future__ import annotations

import copy
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import diffhook
from tests.integrations.watched import Watched
from tests.runs import TinyDenoiser, denoising_losses

Feed = Callable[[Any], Iterator[Tensor]]


def _one_ahead(loader: Any) -> Iterator[Tensor]:
    """The next batch is cast while the present one trains."""
    held: deque[Tensor] = deque()
    for (clean,) in loader:
        held.append(clean * 1.0)
        if len(held) == 2:
            yield held.popleft()


def _kept(loader: Any) -> Iterator[Tensor]:
    """All batches are encoded once; then the loop trains on what it kept, in another order."""
    latents = [clean / 2 * 2 for (clean,) in loader]
    for number, _ in enumerate(loader):
        yield latents[number - 1]


def _shuffled(loader: Any) -> Iterator[Tensor]:
    for (clean,) in loader:
        yield clean[torch.randperm(len(clean))]


def _buffer(loader: Any) -> Iterator[Tensor]:
    """A replay buffer of single samples."""
    buffer: list[Tensor] = []
    for (clean,) in loader:
        buffer += list(clean)
        yield torch.stack([buffer[i] for i in torch.randint(len(buffer), (4,)).tolist()])


def _behind(loader: Any) -> Iterator[Tensor]:
    """A copy of the batch is taken after the step, for the next one."""
    held: Tensor | None = None
    for (clean,) in loader:
        if held is not None:
            yield held
        held = clean.clone()


def _halves(loader: Any) -> Iterator[Tensor]:
    for (clean,) in loader:
        yield from clean.chunk(2)[::-1]


FEEDS: dict[str, Feed] = {
    "one ahead": _one_ahead,
    "kept": _kept,
    "shuffled": _shuffled,
    "buffer": _buffer,
    "behind": _behind,
    "halves": _halves,
}


@pytest.mark.parametrize("kind", FEEDS)
def test_rows_have_the_ids_of_what_the_model_is_called_on(tmp_path: Path, kind: str) -> None:
    loop = Watched(tmp_path / "log").prepare()
    seen: list[tuple[int, int]] = []
    for _ in range(2):
        for clean in FEEDS[kind](loop.loader):
            batch = loop.batch(clean)
            seen += [(loop.steps, round(float(row[0, 0, 0]) * 16)) for row in clean]
            loop.accelerator.backward(denoising_losses(loop.model, batch).mean())
            loop.step()
    loop.accelerator.end_training()
    assert loop.log is not None
    table = diffhook.open_log(loop.log).train
    assert list(zip(table["step"].tolist(), table["sample"].tolist(), strict=True)) == seen


def test_a_loop_in_another_thread_is_followed_there(tmp_path: Path) -> None:
    loop = Watched(tmp_path / "log").prepare()
    seen: list[int] = []

    def train() -> None:
        for clean in _shuffled(loop.loader):
            seen.extend((clean[:, 0, 0, 0] * 16).round().int().tolist())
            loop.accelerator.backward(denoising_losses(loop.model, loop.batch(clean)).mean())
            loop.step()

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    loop.accelerator.end_training()
    assert diffhook.open_log(tmp_path / "log").train["sample"].tolist() == seen


def test_rows_that_a_loop_blends_with_what_it_kept_after_the_step_are_left_out(tmp_path: Path) -> None:
    """Also long after the first steps, in which everything is followed."""
    loop = Watched(tmp_path / "log").prepare()
    kept: Tensor | None = None
    for _ in range(4):
        for (clean,) in loop.loader:
            share = torch.tensor([0.0, 1.0, 0.0, 1.0])[:, None, None, None]
            blended = clean if kept is None else torch.lerp(clean, kept, share)
            loop.accelerator.backward(denoising_losses(loop.model, loop.batch(blended)).mean())
            loop.step()
            kept = clean.clone()
    loop.accelerator.end_training()
    assert diffhook.open_log(tmp_path / "log").train["step"].tolist() == [0] * 4


def test_a_model_that_is_trained_later_is_told_and_its_batches_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loop = Watched(tmp_path / "log").prepare().epoch()
    loop.model, loop.optimizer = loop.accelerator.prepare(
        student := copy.deepcopy(loop.model), torch.optim.SGD(student.parameters(), 0.01)
    )
    expected = dict(loop.expected)
    loop.epoch()
    loop.expected = expected
    loop.assert_rows()
    assert caplog.text.count("the capture began without it") == 1
    assert loop.hook.capture.session.absences.counts == {"later-model": 3}


def test_what_cannot_be_followed_is_left_out_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loop = Watched(tmp_path / "log").prepare()
    other = torch.from_numpy(np.concatenate([clean.numpy() for (clean,) in loop.loader])).flip(0)
    for number, _ in enumerate(loop.loader):
        batch = loop.batch(other[4 * number : 4 * number + 4])
        loop.accelerator.backward(denoising_losses(loop.model, batch).mean())
        loop.step()
    loop.accelerator.end_training()
    assert loop.log is not None
    assert len(diffhook.open_log(loop.log).train["sample"]) == 0
    assert caplog.text.count("was not made of a batch of the loader") == 1


def test_samples_of_several_rows_are_left_out_where_two_are_mixed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loop = Watched(tmp_path / "log").prepare()
    for (clean,) in loop.loader:
        batch = loop.batch(0.6 * clean + 0.4 * clean.flip(0))
        loop.accelerator.backward(denoising_losses(loop.model, batch).mean())
        loop.step()
    loop.accelerator.end_training()
    assert "made of several samples" in caplog.text
    assert all(record.getMessage().count("left out") < 2 for record in caplog.records)


def test_a_forward_that_no_loss_comes_of_has_no_say(tmp_path: Path) -> None:
    loop = Watched(tmp_path / "log").prepare()
    for (clean,) in loop.loader:
        batch = loop.batch(clean)
        loop.note(batch)
        denoising_losses(loop.model, (clean, batch[1], batch[2] // 2 + 1))
        loop.accelerator.backward(denoising_losses(loop.model, batch).mean())
        loop.step()
    loop.assert_rows()


def test_timesteps_that_the_loop_changes_in_place_are_those_of_the_call(tmp_path: Path) -> None:
    loop = Watched(tmp_path / "log").prepare()
    told: list[int] = []
    for (clean,) in loop.loader:
        batch = loop.batch(clean)
        told += batch[2].tolist()
        loss = denoising_losses(loop.model, batch).mean()
        batch[2].zero_()
        loop.accelerator.backward(loss)
        loop.step()
    loop.accelerator.end_training()
    assert loop.log is not None
    assert diffhook.open_log(loop.log).train["timestep"].tolist() == told


def test_parameters_that_are_trained_later_end_the_rows_and_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = TinyDenoiser()
    model.time.requires_grad_(False)
    loop = Watched(tmp_path / "log", model).prepare()
    for (clean,) in loop.loader:
        batch = loop.batch(clean)
        if loop.steps < 2:
            loop.note(batch)
        loop.accelerator.backward(denoising_losses(loop.model, batch).mean())
        loop.step()
        model.time.requires_grad_(loop.steps >= 2)
    loop.assert_rows()
    assert (
        "2 parameters are trained that were not when the capture began (time.weight, time.bias)"
        in caplog.text
    )


def test_nothing_is_left_in_torch_after_a_loop_that_fails(tmp_path: Path) -> None:
    loop = Watched(tmp_path / "log").prepare()
    batches = iter(loop.loader)
    next(batches)
    with pytest.raises(RuntimeError, match="the loop's own"):
        raise RuntimeError("the loop's own")
    loop.hook.close()
    assert torch._C._len_torch_function_stack() == 0
