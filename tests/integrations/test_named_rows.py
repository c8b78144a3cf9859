"""Rows that the loop names itself: believed, unless the batch beside the names shows another order."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import diffhook
from diffhook.errors import LogError
from diffhook.integrations.torch import TorchHook
from tests.runs import TinyDenoiser, denoising_losses, identified

IN_ORDER = torch.arange(4)
SHUFFLED = torch.tensor([2, 0, 3, 1])
REDRAWN = torch.tensor([1, 1, 3, 0])  # with replacement, as pairs of optimal transport are


def _train(log: Path, named: Tensor, given: Tensor | None, called: Tensor) -> list[tuple[int, int]]:
    """Two steps on four rows each; (sample, timestep) of the rows in the log.

    Args:
        named: which samples the loop says the rows are.
        given: the batch that it shows beside, by its samples; None: none.
        called: the rows of that batch on which it calls the model, each at ten times its sample's number.
    """
    model = TinyDenoiser()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    shown = IN_ORDER if given is None else given
    with TorchHook(log, model, optimizer, every=1, probe=False) as hook:
        for first in (0, 4):
            ids, batch = first + shown, identified()[first + shown]
            with hook.step(sample_ids=first + named, batch=None if given is None else batch):
                rows = batch[called]
                triple = rows, torch.ones_like(rows), 10 * ids[called]
                denoising_losses(model, triple).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return [(sample, timestep) for _, sample, timestep in _rows(log)]


def _rows(log: Path) -> list[tuple[int, int, int]]:
    """(step, sample, timestep) of the rows in the log."""
    try:
        table = diffhook.open_log(log).train
    except LogError:  # nothing was captured
        return []
    columns = (table[name].astype(int).tolist() for name in ("step", "sample", "timestep"))
    return list(zip(*columns, strict=True))


@pytest.mark.parametrize("order", [SHUFFLED, REDRAWN], ids=["shuffled", "redrawn"])
def test_a_batch_whose_rows_come_in_another_order_is_left_out(
    tmp_path: Path, order: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    assert _train(tmp_path / "log", IN_ORDER, IN_ORDER, order) == []
    assert "in another order than the batch has" in caplog.text


@pytest.mark.parametrize("order", [IN_ORDER, SHUFFLED, REDRAWN], ids=["in order", "shuffled", "redrawn"])
@pytest.mark.parametrize("beside", [True, False], ids=["batch", "no batch"])
def test_names_in_the_order_of_the_call_are_believed(tmp_path: Path, order: Tensor, beside: bool) -> None:
    given, called = (order, IN_ORDER) if beside else (None, order)
    found = _train(tmp_path / "log", order, given, called)
    assert found == [(sample, 10 * sample) for first in (0, 4) for sample in (first + order).tolist()]


def _train_in_parts(log: Path, parts: list[Tensor], *, beside: bool, named: bool) -> list[tuple[int, int]]:
    """Two steps on four rows each, named once a step, with a backward for each part of them."""
    model = TinyDenoiser()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with TorchHook(log, model, optimizer, every=1, probe=False) as hook:
        for first in (0, 4):
            ids, batch = first + IN_ORDER, identified()[first + IN_ORDER]
            told = {"batch": (batch, {"y": ids})} if beside else {}
            with hook.step(sample_ids=ids, timesteps=10 * ids if named else None, **told):
                for part in parts:
                    rows = batch[part].to("cpu")
                    triple = rows, torch.ones_like(rows), 10 * ids[part]
                    denoising_losses(model, triple).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return [(sample, timestep) for step, sample, timestep in _rows(log) if step == sample // 4]


PARTS = {
    "halves": [IN_ORDER[:2], IN_ORDER[2:]],
    "uneven": [IN_ORDER[:3], IN_ORDER[3:]],
    "later first": [IN_ORDER[2:], IN_ORDER[:2]],
    "some rows": [IN_ORDER[[0, 2, 3]]],
}


@pytest.mark.parametrize("named", [False, True], ids=["told", "named timesteps"])
@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_a_step_may_be_named_once_around_the_parts_of_its_batch(
    tmp_path: Path, parts: list[Tensor], named: bool
) -> None:
    found = _train_in_parts(tmp_path / "log", parts, beside=True, named=named)
    called = torch.cat(parts)
    assert found == [(sample, 10 * sample) for first in (0, 4) for sample in (first + called).tolist()]


def test_parts_of_a_batch_that_is_not_shown_are_left_out_with_what_to_do(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert _train_in_parts(tmp_path / "log", PARTS["halves"], beside=False, named=False) == []
    assert "2 rows" in caplog.text
    assert "the whole batch, batch=" in caplog.text


def test_parts_in_another_order_than_the_batch_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parts = [SHUFFLED[:2], SHUFFLED[2:]]
    assert _train_in_parts(tmp_path / "log", parts, beside=True, named=False) == []
    assert "in another order than the batch has" in caplog.text
