"""Who calls what is trained: wrappers, hosts of adapters, models beside the denoiser."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import diffhook
from tests.gradients.odd_models import HiddenWeight
from tests.integrations.watched import Watched
from tests.runs import SCHEDULER, TinyDenoiser


class Guided(nn.Module):
    """A trained wrapper that draws its timesteps and makes its loss, as lucidrains' GaussianDiffusion."""

    def __init__(self) -> None:
        super().__init__()
        self.model = TimeNamed()
        self.drawn: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        time = torch.randint(0, 1000, (len(images),))
        self.drawn += time.tolist()
        noise = torch.randn_like(images)
        noisy = SCHEDULER.add_noise(images, noise, time)
        self.last = images, noise, time
        return F.mse_loss(self.model(noisy, time), noise)


class TimeNamed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = TinyDenoiser()

    def forward(self, x: Tensor, time: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
        found: Tensor = self.inner(x, time)[0]
        return found


def _guided_losses(model: Any, batch: Any) -> Tensor:
    clean, noise, time = batch
    predicted = model.model(SCHEDULER.add_noise(clean, noise, time), time)
    return (predicted - noise).square().flatten(1).mean(1)


def test_timesteps_that_the_trained_module_draws_inside_are_seen(tmp_path: Path) -> None:
    loop = Watched(tmp_path / "log", Guided()).prepare()
    for (clean,) in loop.loader:
        loss = loop.model(clean)
        loop.note(loop.model.last, _guided_losses)
        loop.accelerator.backward(loss)
        loop.step()
    table = loop.assert_rows()
    assert table["timestep"].tolist() == loop.model.drawn
    assert np.isfinite(table["loss"]).all()


class Discriminator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.judge = nn.Linear(64, 1)

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.judge(images.flatten(1))
        return found


@pytest.mark.parametrize("first", ["denoiser", "discriminator"])
def test_a_discriminator_beside_the_denoiser_is_no_part_of_the_rows(
    tmp_path: Path, first: str, caplog: pytest.LogCaptureFixture
) -> None:
    loop = Watched(tmp_path / "log")
    judge: Any = Discriminator()
    own: Any = torch.optim.SGD(judge.parameters(), 0.1)
    if first == "discriminator":
        judge, own = loop.accelerator.prepare(judge, own)
    loop.prepare()
    if first == "denoiser":
        judge, own = loop.accelerator.prepare(judge, own)

    def adversarial(model: nn.Module, batch: Any) -> Tensor:
        clean, noise, timesteps = batch
        predicted = model(SCHEDULER.add_noise(clean, noise, timesteps), timesteps)[0]
        kind = judge if next(model.parameters()).dtype == torch.float32 else twin
        return (predicted - noise).square().flatten(1).mean(1) - 0.1 * kind(predicted)[:, 0]

    for (clean,) in loop.loader:
        own.zero_grad()
        (judge(clean) - judge(torch.randn_like(clean))).mean().backward()
        own.step()
        twin = Discriminator().double()
        twin.load_state_dict(judge.state_dict())
        batch = loop.batch(clean)
        loop.note(batch, adversarial)
        loop.accelerator.backward(adversarial(loop.model, batch).mean())
        loop.step()
    loop.assert_rows()
    assert "Discriminator: trained by an optimiser of its own" in caplog.text


@pytest.mark.parametrize("first", ["model", "average"])
def test_an_average_prepared_beside_the_model_is_no_part_of_the_run(
    tmp_path: Path, first: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As U-ViT prepares its EMA, which it never freezes: queries would want both models."""
    loop = Watched(tmp_path / "log")
    average = copy.deepcopy(loop.model)
    if first == "average":
        average = loop.accelerator.prepare(average)
    loop.prepare()
    if first == "model":
        average = loop.accelerator.prepare(average)
    loop.epoch()
    loop.assert_rows()
    known = diffhook.open_log(tmp_path / "log").config["identity"]["parameters"]
    assert [name for name, _ in known] == [name for name, _ in loop.model.named_parameters()]
    assert "a second TinyDenoiser: no optimiser moves it" in caplog.text


class Low(nn.Module):
    """A low-rank update that takes the place of a frozen layer's forward, as kohya's network modules do."""

    def __init__(self, host: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        width = host.weight.shape[1]
        self.down: Any
        if isinstance(host, nn.Conv2d):
            self.down = nn.Conv2d(width, 2, host.kernel_size, padding=host.padding, bias=False)  # type: ignore[arg-type]
            self.up: Any = nn.Conv2d(2, host.out_channels, 1, bias=False)
        else:
            self.down, self.up = nn.Linear(width, 2, bias=False), nn.Linear(2, len(host.weight), bias=False)
        self.original = [host.forward]  # in a list: no submodule of ours

    def forward(self, inputs: Tensor) -> Tensor:
        return self.original[0](inputs) + self.up(self.down(inputs))


class Network(nn.Module):
    """What is prepared and trained, and never called."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        hosts = [m for m in unet.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        self.lows = nn.ModuleList([Low(host) for host in hosts])  # type: ignore[arg-type]
        for host, low in zip(hosts, self.lows, strict=True):
            host.forward = low.forward  # type: ignore[method-assign]


@pytest.mark.parametrize("by_name", [False, True])
def test_a_network_of_replaced_forwards_that_is_never_called_is_seen_through_its_host(
    tmp_path: Path, by_name: bool
) -> None:
    unet = TinyDenoiser().requires_grad_(False)
    network = Network(unet)
    loop = Watched(tmp_path / "log", network).prepare()
    parameters = list(network.parameters())

    def call(batch: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        clean, noise, timesteps = (t.to(dtype) if t.is_floating_point() else t for t in batch)
        noisy = SCHEDULER.add_noise(clean, noise, timesteps)
        told = {"timestep": timesteps} if by_name else {}
        predicted = unet(noisy, *(() if by_name else (timesteps,)), **told)[0]
        return (predicted - noise).square().flatten(1).mean(1)

    drawn: list[int] = []
    for (clean,) in loop.loader:
        batch = loop.batch(clean)
        drawn += batch[2].tolist()
        losses = call(batch)
        loop.note_losses(clean, losses, parameters)
        loop.accelerator.backward(losses.mean())
        loop.step()
    assert loop.assert_rows()["timestep"].tolist() == drawn


class Hidden(HiddenWeight):
    """A weight that is added to a frozen layer's, and no layer itself, as LyCORIS' LoHa."""

    def __init__(self, host: Any) -> None:
        super().__init__(len(host.weight), host.weight[0].numel())
        self.host = [host]

    def forward(self, x: Tensor) -> Tensor:
        host = self.host[0]
        weight = host.weight + 0.1 * self.weight(x).reshape(host.weight.shape)
        if isinstance(host, nn.Conv2d):
            return F.conv2d(x, weight, host.bias, padding=host.padding)  # type: ignore[arg-type]
        return F.linear(x, weight, host.bias)


def test_adapters_without_any_layer_are_seen_through_each_frozen_model_that_runs_them(tmp_path: Path) -> None:
    unet, encoder = TinyDenoiser().requires_grad_(False), nn.Sequential(nn.Linear(2, 1)).requires_grad_(False)
    hosts = [m for model in (encoder, unet) for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    network = nn.ModuleList([Hidden(host) for host in hosts])
    for host, hidden in zip(hosts, network, strict=True):
        host.forward = hidden.forward  # type: ignore[method-assign]
    loop = Watched(tmp_path / "log", network).prepare()
    parameters = list(network.parameters())
    for (clean,) in loop.loader:
        clean, noise, timesteps = loop.batch(clean)
        caption = encoder(torch.stack([clean.mean((1, 2, 3)), clean.amax((1, 2, 3))], 1))
        noisy = SCHEDULER.add_noise(clean, noise, timesteps) + caption[:, :, None, None]
        losses = (unet(noisy, timesteps)[0] - noise).square().flatten(1).mean(1)
        loop.note_losses(clean, losses, parameters)
        loop.accelerator.backward(losses.mean())
        loop.step()
    loop.assert_rows()


def test_training_is_bit_identical_beside_all_of_that(tmp_path: Path) -> None:
    left = []
    for log in (None, tmp_path / "log"):
        loop = Watched(log, Guided()).prepare()
        for (clean,) in loop.loader:
            (8 * loop.model(clean)).backward()
            loop.step()
        loop.accelerator.end_training()
        left.append([p.detach().clone() for p in loop.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*left, strict=True))
    assert torch.autograd.backward.__module__ == "torch.autograd"
    assert not torch.nn.modules.module._global_forward_pre_hooks


class Control(nn.Module):
    """Trained beside a frozen denoiser, which gets its output."""

    def __init__(self) -> None:
        super().__init__()
        self.inward = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        shifted: Tensor = self.inward(sample) * (1 + timestep.to(sample.dtype)[:, None, None, None] / 1000)
        return torch.cat([shifted, shifted.square()], 1)


class Controlled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.denoiser = TinyDenoiser()

    def forward(self, sample: Tensor, timestep: Tensor, residual: Tensor) -> Any:
        return self.denoiser(sample + residual.mean(1, keepdim=True), timestep)


def test_the_loss_column_is_of_the_frozen_model_that_the_trained_one_controls(tmp_path: Path) -> None:
    loop = Watched(tmp_path / "log", Control()).prepare()
    torch.manual_seed(1)
    frozen = Controlled().requires_grad_(False)
    expected: list[float] = []
    for (clean,) in loop.loader:
        clean, noise, timesteps = loop.batch(clean)
        noisy = SCHEDULER.add_noise(clean, noise, timesteps)
        predicted = frozen(noisy, timesteps, loop.model(noisy, timesteps))[0]
        expected += (predicted - noise).square().flatten(1).mean(1).tolist()
        loop.accelerator.backward(F.mse_loss(predicted, noise))
        loop.step()
    loop.accelerator.end_training()
    assert loop.log is not None
    np.testing.assert_allclose(diffhook.open_log(loop.log).train["loss"], expected, rtol=1e-4)


def test_a_model_whose_forward_is_called_by_name_is_said_to_be_passed_by(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As lucidrains' Imagen calls its unet."""
    loop = Watched(tmp_path / "log", Control()).prepare()
    for (clean,) in loop.loader:
        clean, noise, timesteps = loop.batch(clean)
        predicted = loop.model.forward(SCHEDULER.add_noise(clean, noise, timesteps), timesteps)
        loop.accelerator.backward(F.mse_loss(predicted[:, :1], noise))
        loop.step()
    loop.accelerator.end_training()
    assert "Control, which is trained, was not called itself, but its parts were" in caplog.text
