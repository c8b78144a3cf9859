"""Processes that must do something together find out first whether all of them have come."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

from diffhook.capture.loop.run import ranks as of_ranks
from diffhook.capture.loop.run.ranks import Ranks


class _Nobody:
    def settle(self, step: int) -> bool:
        return True


@pytest.fixture
def two(tmp_path: Path) -> Iterator[list[Ranks]]:
    """Both ends, in threads of one process: the store does not know the difference."""
    store, nobody = dist.FileStore(str(tmp_path / "store"), 2), _Nobody()
    with (
        mock.patch.object(of_ranks, "process_store", return_value=store),
        mock.patch.object(dist, "is_initialized", return_value=True),
        mock.patch.object(of_ranks, "_PATIENCE", 0.5),
    ):
        yield [Ranks(rank, 2, nobody.settle) for rank in (0, 1)]


def _meet(two: list[Ranks], what: str, delays: tuple[float, float]) -> list[bool]:
    answers: dict[int, bool] = {}

    def come(rank: int) -> None:
        time.sleep(delays[rank])
        answers[rank] = two[rank].meet(what)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return [answers[0], answers[1]]


def test_all_who_come_in_time_do_it_together(two: list[Ranks]) -> None:
    assert _meet(two, "one", (0, 0.2)) == [True, True]
    assert _meet(two, "two", (0.2, 0)) == [True, True]


@pytest.mark.parametrize("late", [0, 1])
def test_one_that_comes_too_late_hears_that_the_others_have_gone_on(two: list[Ranks], late: int) -> None:
    assert _meet(two, "one", (1.5 * (late == 0), 1.5 * (late == 1))) == [False, False]
    assert _meet(two, "two", (0, 0.1)) == [True, True]


def test_nobody_waits_for_one_that_has_left(two: list[Ranks]) -> None:
    with mock.patch.object(two[0], "_patience", 60.0):
        with two[1].leaving():
            pass
        began = time.monotonic()
        assert not two[0].meet("one")
        assert time.monotonic() - began < 10


def test_a_process_alone_need_not_ask() -> None:
    assert Ranks(0, 1, _Nobody().settle).meet("anything")
