"""All rows of a log have timesteps in the same units, also those from before the training loss was known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import diffhook
from diffhook.integrations.accelerate import DiffHook
from tests.runs import TinyDenoiser

BATCH = 8


class Training:
    """Flow matching mixed by hand, whose model is told 0 … 1; remembers what it has drawn."""

    def __init__(self, log: Path, *, strict: bool = True, **options: Any) -> None:
        torch.manual_seed(0)
        self.accelerator = Accelerator(cpu=True)
        DiffHook(self.accelerator, log, strict=strict, alerts=(), projection_dim=16, every=1, **options)
        model, data = TinyDenoiser(), TensorDataset(torch.randn(64, 1, 12, 12).cumsum(2).cumsum(3) / 12)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        loader = DataLoader(data, BATCH, shuffle=True)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(model, optimizer, loader)
        self.drawn: list[float] = []

    def epoch(self, save: Path | None = None) -> None:
        for step, (clean,) in enumerate(self.loader):
            self.accelerator.backward(self.loss(self.model, clean))
            self.optimizer.step()
            self.optimizer.zero_grad()
            if save is not None and step == 1:
                self.accelerator.save_state(str(save))

    def loss(self, model: nn.Module, clean: Tensor) -> Tensor:
        noise, sigmas = torch.randn_like(clean), torch.rand(len(clean))
        self.drawn += sigmas.tolist()
        share = sigmas.view(-1, 1, 1, 1)
        return F.mse_loss(model((1 - share) * clean + share * noise, sigmas)[0], noise - clean)


@pytest.mark.parametrize("probe", [None, False])
@pytest.mark.parametrize("saves", [False, True])
def test_rows_of_before_the_loss_was_known_have_the_units_of_those_after(
    tmp_path: Path, probe: Any, saves: bool
) -> None:
    training = Training(tmp_path / "log", probe=probe)
    for number in range(3):
        training.epoch(tmp_path / "saved" if saves and number == 0 else None)
    training.accelerator.end_training()
    log = diffhook.open_log(tmp_path / "log")
    assert log.objective is not None
    assert log.objective["timestep_scale"] == pytest.approx(1 / 1000)
    assert len(log.train) == len(training.drawn)
    np.testing.assert_allclose(log.train["timestep"], 1000 * np.array(training.drawn), rtol=1e-5)


def test_rows_that_wait_at_the_end_are_counted_and_at_a_checkpoint_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Of too short a training to know the loss from."""
    training = Training(tmp_path / "log", probe=False)
    for step, (clean,) in zip(range(4), training.loader, strict=False):
        training.accelerator.backward(training.loss(training.model, clean))
        training.optimizer.step()
        training.optimizer.zero_grad()
        if step % 2:
            training.accelerator.save_state(str(tmp_path / f"saved-{step}"))
    training.accelerator.end_training()
    assert "diffhook: 32 rows, 2 snapshots" in capsys.readouterr().out
    assert len(diffhook.open_log(tmp_path / "log").train) == 32
    assert caplog.text.count("16 rows before this checkpoint wait in memory") == 1


def test_where_the_loss_is_never_known_all_are_the_models(tmp_path: Path) -> None:
    training = Training(tmp_path / "log", probe=False)
    training.loss = lambda model, clean: Training.loss(training, model, clean).sqrt()  # type: ignore[method-assign]
    for _ in range(3):
        training.epoch()
    training.accelerator.end_training()
    log = diffhook.open_log(tmp_path / "log")
    assert log.objective is None
    np.testing.assert_allclose(log.train["timestep"], training.drawn, rtol=1e-6)
