"""What happens in another thread than the training's is no part of its loop."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from zarr.core.sync import _get_loop

import diffhook
from diffhook.capture.loop.losses.loss_reader import LossReader
from diffhook.errors import LogError
from diffhook.integrations.accelerate import DiffHook
from diffhook.integrations.torch import fetches
from diffhook.log.writer import LogWriter
from tests.integrations.watched import Watched
from tests.runs import denoising_losses


def _left_by_another_training(log: Path) -> list[Iterator[Any]]:
    """A pass over a prepared loader that its loop never ended, as an endless ``cycle`` of batches."""
    accelerator = Accelerator(cpu=True)
    with DiffHook(accelerator, log):
        left = iter(accelerator.prepare(DataLoader(TensorDataset(torch.zeros(4)), 1)))
        next(left)
    return [left]


def test_rows_are_of_their_step_whichever_thread_collects_what_an_earlier_training_has_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The collector runs where something is allocated: in the log's writer, say, during a step."""
    left = _left_by_another_training(tmp_path / "before")
    loop = Watched(tmp_path / "log", every=1).prepare()
    training, stepped, reads = threading.get_ident(), threading.Event(), threading.Event()
    read = LossReader.read

    def read_late(self: LossReader, *given: Any) -> Any:
        """In another thread this may take as long as the optimiser's step."""
        if threading.get_ident() != training:
            reads.set()
            stepped.wait(10)
        return read(self, *given)

    monkeypatch.setattr(LossReader, "read", read_late)
    for (clean,) in loop.loader:
        batch = loop.batch(clean)
        loop.note(batch)
        loop.accelerator.backward(denoising_losses(loop.model, batch).mean())
        collector = threading.Thread(target=left.clear)
        collector.start()
        while collector.is_alive() and not reads.is_set():
            collector.join(0.01)
        loop.step()
        stepped.set()
        collector.join()
    loop.assert_rows()
    assert not reads.is_set()


@pytest.fixture
def _collected_by_hand() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def _in_the_writer(writer: LogWriter, job: Callable[[], Any]) -> None:
    writer._submit(job)


def _in_zarr_s_loop(_: LogWriter, job: Callable[[], Any]) -> None:
    _get_loop().call_soon_threadsafe(job)


@pytest.mark.usefixtures("_collected_by_hand")
@pytest.mark.parametrize("where", [_in_the_writer, _in_zarr_s_loop])
def test_a_run_that_is_dropped_keeps_its_rows_whichever_thread_collects_it(
    tmp_path: Path, where: Callable[[LogWriter, Callable[[], Any]], None]
) -> None:
    """Those that must write them do not wait for themselves."""
    loop = Watched(tmp_path / "log", every=1).prepare().epoch().epoch()
    recorder, gone = loop.hook.capture.session.recorder, weakref.ref(loop.hook.capture)
    assert recorder is not None
    writer, expected = recorder.writer, set(loop.expected)
    loop.cycle = loop  # type: ignore[attr-defined]
    del loop, recorder
    assert gone() is not None
    collected = threading.Event()
    where(writer, lambda: (gc.collect(), collected.set()))
    assert collected.wait(20)
    for thread in threading.enumerate():
        if thread.name == "diffhook-last":
            thread.join(20)
    assert gone() is None
    assert torch._C._len_torch_function_stack() == 0
    table = diffhook.open_log(tmp_path / "log").train
    assert set(zip(table["step"].tolist(), table["sample"].tolist(), strict=True)) == expected


@pytest.mark.parametrize("name", ["begin_another", "end_another"])
def test_an_error_of_ours_around_the_fetch_of_a_batch_is_not_the_loops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def fails(*_: Any) -> None:
        raise MemoryError("injected")

    loop = Watched(tmp_path / "log", every=1).prepare()
    monkeypatch.setattr(fetches, "_within", threading.local())
    monkeypatch.setattr(fetches, name, fails)
    loop.epoch()
    monkeypatch.undo()
    loop.assert_rows()


class _Held:
    """An image as a loop may have it, in which nothing is seen to be one."""

    def __init__(self, image: Tensor) -> None:
        self.image = image


def _held(items: list[tuple[Tensor]]) -> dict[str, Any]:
    images = [image for (image,) in items]
    return {"ids": [round(float(image[0, 0, 0]) * 16) for image in images], "held": list(map(_Held, images))}


def _loop_that_shows_no_images(log: Path) -> Watched:
    loop = Watched(log, every=1)
    loop.loader = DataLoader(loop.loader.dataset, 4, collate_fn=_held)
    return loop.prepare()


def _train_on(loop: Watched, batch: dict[str, Any]) -> None:
    clean = torch.stack([held.image for held in batch["held"]])
    inputs = loop.batch(clean)
    loop.note(inputs)
    loop.accelerator.backward(denoising_losses(loop.model, inputs).mean())
    loop.step()


def test_batches_that_a_thread_fetches_from_a_prepared_loader_are_told_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Which of them the model is called on is not seen: the last one may be that of the step to come."""
    loop = _loop_that_shows_no_images(tmp_path / "log")
    with ThreadPoolExecutor(1) as thread:
        fetched = iter(loop.loader)
        following = thread.submit(next, fetched, None)
        while batch := following.result():
            following = thread.submit(next, fetched, None)
            following.exception()  # it has been fetched when the model is called
            _train_on(loop, batch)
        del fetched
    assert loop.steps == 3
    with pytest.raises(LogError):  # there is none
        loop.assert_rows()
    assert caplog.text.count("fetched in another thread") == 1


def test_a_batch_that_a_thread_fetches_in_between_has_no_rows(tmp_path: Path) -> None:
    """The one that came before it in the training's thread is not taken for it."""
    loop = _loop_that_shows_no_images(tmp_path / "log")
    fetched = iter(loop.loader)
    _train_on(loop, next(fetched))
    known = dict(loop.expected)
    with ThreadPoolExecutor(1) as thread:
        _train_on(loop, thread.submit(next, fetched).result())
    loop.expected = known
    _train_on(loop, next(fetched))
    loop.assert_rows()


def _one_thread_for_all(work: list[Callable[[], Any]]) -> None:
    with ThreadPoolExecutor(1) as thread:
        for piece in work:
            thread.submit(piece).result()


def _a_thread_for_each(work: list[Callable[[], Any]]) -> None:
    for piece in work:
        _one_thread_for_all([piece])


@pytest.mark.parametrize("threads", [_one_thread_for_all, _a_thread_for_each])
def test_a_loop_may_train_in_other_threads_than_the_hook_was_made_in(
    tmp_path: Path, threads: Callable[[list[Callable[[], Any]]], None]
) -> None:
    loop = Watched(tmp_path / "log", every=1).prepare()
    threads([loop.epoch, loop.epoch])
    assert loop.steps == 6
    loop.assert_rows()
