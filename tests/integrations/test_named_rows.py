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
    try:
        table = diffhook.open_log(log).train
    except LogError:  # nothing was captured
        return []
    return list(zip(table["sample"].tolist(), table["timestep"].astype(int).tolist(), strict=True))


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
