"""Probes give the model again what it was told besides, by any name, if it is the sample's own."""

from __future__ import annotations

import copy
from collections.abc import Callable
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
from diffhook.capture.objective.noise import noise_bank
from diffhook.integrations.accelerate import DiffHook
from tests.runs import SCHEDULER

COUNT = 80
IMAGES = torch.randn(COUNT, 1, 8, 8, generator=torch.Generator().manual_seed(0)).cumsum(3)
LABELS = torch.arange(COUNT) % 5
GRID = diffhook.Grid(3)


class Net(nn.Module):
    """Told a class by its number, or by ten numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.classes = nn.Linear(10, 6)
        self.time = nn.Linear(1, 6)
        self.inward = nn.Conv2d(1, 6, 3, padding=1)
        self.outward = nn.Conv2d(6, 1, 3, padding=1)

    def forward(self, img: Tensor, t: Tensor, c: Tensor | None = None, sharp: bool = False) -> Tensor:
        time = self.time(t[:, None].to(img.dtype) / 1000)
        if c is not None:
            code = F.one_hot(c, 10) if not c.is_floating_point() else c
            time = time + self.classes(code.to(img.dtype))
        hidden = F.silu(self.inward(img) + time[..., None, None])
        return self.outward(hidden * 2 if sharp else hidden)


Told = Callable[[Tensor, Tensor, Tensor], Any]  # labels, timesteps, noise → what the model is told besides

OWN: dict[str, tuple[Told, int]] = {  # and for how many epochs
    "of the batch, once": (lambda y, t, e: {"c": y}, 1),
    "of the batch, as other numbers": (lambda y, t, e: {"c": y.float()[:, None].expand(-1, 10)}, 3),
    "made of it, seen again": (lambda y, t, e: {"c": F.one_hot(y, 10).float()}, 3),
    "a flag as it is by default": (lambda y, t, e: {"c": y, "sharp": False}, 1),
}
OTHERS: dict[str, tuple[Told, str]] = {
    "timestep": (lambda y, t, e: {"c": t // 500}, "'c', which changes"),
    "rare timestep": (lambda y, t, e: {"c": (t < 20).long()}, "'c', which changes"),
    "label and timestep": (lambda y, t, e: {"c": torch.where(t < 100, 9, y)}, "'c', which changes"),
    "noise": (lambda y, t, e: {"c": e.flatten(1)[:, :10]}, "'c', which changes"),
    "mask of the noise": (lambda y, t, e: {"c": (e.flatten(1)[:, 0] > 0).long()}, "'c', which changes"),
    "drawn anew": (lambda y, t, e: {"c": torch.randint(0, 10, (len(y),))}, "'c', which changes"),
    "dropped": (lambda y, t, e: {"c": torch.where(torch.rand(len(y)) < 0.1, 9, y)}, "'c', which changes"),
    "shared": (lambda y, t, e: {"c": torch.ones(1, 10)}, "'c', which has not a row"),
    "a flag": (lambda y, t, e: {"c": y, "sharp": True}, "'sharp', which has not a row"),
}


def train(log: Path, told: Told, epochs: int, loader: Any = None) -> Net:
    torch.manual_seed(0)
    accelerator, model = Accelerator(cpu=True), Net()
    DiffHook(accelerator, log, every=1, strict=True, probe=diffhook.Probe(None, GRID), snapshot_every=5)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    loader = loader or DataLoader(TensorDataset(IMAGES, LABELS), 16, shuffle=True)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for _ in range(epochs):
        for clean, labels, *drawn in loader:
            noise, timesteps = drawn or (torch.randn_like(clean), torch.randint(0, 1000, (len(clean),)))
            noisy = SCHEDULER.add_noise(clean, noise, timesteps)
            predicted = prepared(noisy, timesteps, **told(labels, timesteps, noise))
            accelerator.backward(F.mse_loss(predicted, noise))
            optimizer.step()
            optimizer.zero_grad()
    accelerator.end_training()
    return model


@pytest.mark.parametrize("name", OWN)
def test_probes_are_the_batch_1_loops(name: str, tmp_path: Path) -> None:
    told, epochs = OWN[name]
    model = train(tmp_path / "log", told, epochs)
    table = diffhook.open_log(tmp_path / "log").probe
    assert set(table["sample"]) == set(range(COUNT))
    last = np.flatnonzero(table["step"][:] == table["step"][:].max())
    for row in last[::17]:
        sample, timestep = int(table["sample"][row]), torch.tensor([int(table["timestep"][row])])
        twin, clean = copy.deepcopy(model).double(), IMAGES[sample : sample + 1].double()
        noise = noise_bank(torch.tensor([int(table["noise_seed"][row])]), clean.float()).double()
        arguments = told(LABELS[sample : sample + 1], timestep, noise)
        predicted = twin(SCHEDULER.add_noise(clean, noise, timestep), timestep, **arguments)
        (predicted - noise).square().mean().backward()
        expected = torch.cat([p.grad.flatten() for p in twin.parameters() if p.grad is not None]).norm()
        assert table["grad_norm"][row] == pytest.approx(float(expected), rel=2e-5)


def test_classes_of_any_name_are_held_against_others(tmp_path: Path) -> None:
    train(tmp_path / "log", OWN["of the batch, once"][0], 1)
    table = diffhook.open_log(tmp_path / "log").probe
    np.testing.assert_array_equal(table["label"][:], LABELS.numpy()[table["sample"][:]])
    assert np.isfinite(table["label_contrast"][:]).all()


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_the_samples_own_is_not_given_again(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told, why = OTHERS[name]
    train(tmp_path / "log", told, 8)
    log = diffhook.open_log(tmp_path / "log")
    assert log.objective is not None
    assert len(log.probe) == 0
    assert caplog.text.count(f"no probes: the model is given {why}") == 1


def test_what_was_seen_once_is_not_known_to_be_the_samples(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(tmp_path / "log", OWN["made of it, seen again"][0], 1)
    assert len(diffhook.open_log(tmp_path / "log").probe) == 0
    assert caplog.text.count("too few samples came again to show that it is theirs, 0 of 64") == 1


def test_a_batch_that_holds_what_is_drawn_proves_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A collation that draws noise and timesteps may have made anything of them."""

    def collate(items: list[Any]) -> tuple[Tensor, ...]:
        timesteps = torch.randint(0, 1000, (len(items),))
        clean = torch.stack([item[0] for item in items])
        return clean, timesteps // 200, torch.randn_like(clean), timesteps

    loader = DataLoader(TensorDataset(IMAGES, LABELS), 16, shuffle=True, collate_fn=collate)
    train(tmp_path / "log", OWN["of the batch, once"][0], 4, loader)
    assert len(diffhook.open_log(tmp_path / "log").probe) == 0
    assert "'c', which changes" in caplog.text


def test_the_loss_is_told_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    accelerator, model = Accelerator(cpu=True), Net()
    DiffHook(accelerator, tmp_path / "log", every=1)
    loader = DataLoader(TensorDataset(IMAGES), 16)
    prepared, optimizer, loader = accelerator.prepare(model, torch.optim.Adam(model.parameters()), loader)
    for (clean,) in (batch for _ in range(2) for batch in loader):
        noise, timesteps = torch.randn_like(clean), torch.randint(0, 1000, (len(clean),))
        noisy = SCHEDULER.add_noise(clean, noise, timesteps)
        accelerator.backward(F.mse_loss(prepared(noisy, timesteps, timesteps // 500), noise))
        optimizer.step()
        optimizer.zero_grad()
    accelerator.end_training()
    told = capsys.readouterr().out
    assert told.index("training loss recognised") < told.index("no probe at the end: the model is given 'c'")
    assert told.count("no probe at the end") == 1
