"""Loops that slip: each row is right all the same, or absent and told."""

from __future__ import annotations

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
from diffhook.integrations.accelerate import DiffHook
from tests.runs import SCHEDULER, TinyDenoiser, denoising_losses, identified
from tests.twins import sample_gradients

Losses = Callable[[nn.Module, Any], Tensor]


class Watched:
    """A loop in pieces whose rows are compared with a batch-1 loop in float64."""

    def __init__(self, log: Path | None, model: nn.Module | None = None, **options: Any) -> None:
        torch.manual_seed(0)
        self.log = log
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=options.pop("accumulation", 1))
        self.model: Any = TinyDenoiser() if model is None else model
        self.optimizer: Any = torch.optim.SGD(self.model.parameters(), 0.01)
        self.loader: Any = DataLoader(TensorDataset(identified()), 4)
        if log is not None:
            self.hook = DiffHook(self.accelerator, log, projection_dim=0, alerts=(), **options)
        self.expected: dict[tuple[int, int], float] = {}  # (step, sample) → norm
        self.steps = 0

    def prepare(self, *, optimizer: bool = True) -> Watched:
        given = [self.model, self.loader] + ([self.optimizer] if optimizer else [])
        prepared = self.accelerator.prepare(*given)
        self.model, self.loader = prepared[:2]
        if optimizer:
            self.optimizer = prepared[2]
        return self

    def batch(self, clean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return clean, torch.randn_like(clean), torch.randint(0, 1000, (len(clean),))

    def note(self, batch: Any, losses: Losses = denoising_losses) -> None:
        gradients = sample_gradients(self.accelerator.unwrap_model(self.model), losses, batch)
        for image, gradient in zip(batch[0], gradients, strict=True):
            self.expected[self.steps, round(float(image[0, 0, 0]) * 16)] = float(gradient.norm())

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1

    def assert_rows(self) -> Any:
        self.accelerator.end_training()
        assert self.log is not None
        table = diffhook.open_log(self.log).train
        keys = list(zip(table["step"].tolist(), table["sample"].tolist(), strict=True))
        assert sorted(keys) == sorted(self.expected)
        np.testing.assert_allclose(table["grad_norm"], [self.expected[key] for key in keys], rtol=1e-5)
        return table


BACKWARDS: dict[str, tuple[Callable[[Watched, Tensor], None], float]] = {
    "loss.backward": (lambda loop, loss: loss.backward(), 1.0),
    "autograd.backward": (lambda loop, loss: torch.autograd.backward(loss), 1.0),
    "of a list": (lambda loop, loss: torch.autograd.backward([loss]), 1.0),
    "scaled": (lambda loop, loss: (8 * loss).backward(), 8.0),
    "divided": (lambda loop, loss: (loss / 4).backward(), 0.25),
    "every second": (
        lambda loop, loss: loop.accelerator.backward(loss) if loop.steps % 2 else loss.backward(),
        1.0,
    ),
}


@pytest.mark.parametrize("name", BACKWARDS)
def test_rows_are_right_whoever_calls_the_backward_and_whatever_multiplies_the_loss(
    tmp_path: Path, name: str
) -> None:
    """A factor on a mean of squared errors is in a row's weight, not in its norm."""
    backward, factor = BACKWARDS[name]
    loop = Watched(tmp_path / "log").prepare()
    for (clean,) in loop.loader:
        batch = loop.batch(clean)
        loop.note(batch)
        backward(loop, denoising_losses(loop.model, batch).mean())
        loop.step()
    table = loop.assert_rows()
    np.testing.assert_allclose(table["weight"], factor / 4, rtol=1e-5)
    assert np.isfinite(table["loss"]).all()


def test_the_loss_column_of_a_weighted_loss_is_whole_and_weighted(tmp_path: Path) -> None:
    """min-SNR: in some batches all weights are 1, in others none."""
    snr = SCHEDULER.alphas_cumprod / (1 - SCHEDULER.alphas_cumprod)

    def weighted(model: nn.Module, batch: Any) -> Tensor:
        weights = (5 / snr[batch[2].long()]).clamp(max=1)
        return denoising_losses(model, batch) * weights.to(batch[0])

    loop = Watched(tmp_path / "log").prepare()
    losses: list[float] = []
    for number, (clean,) in enumerate(loop.loader):
        timesteps = torch.full((4,), 900) if number == 0 else torch.arange(4) * 20 + 1
        batch = (clean, torch.randn_like(clean), timesteps)
        loop.note(batch, weighted)
        found = weighted(loop.model, batch)
        losses += found.tolist()
        loop.accelerator.backward(found.mean())
        loop.step()
    np.testing.assert_allclose(loop.assert_rows()["loss"], losses, rtol=1e-4)


def test_a_step_that_nobody_tells_of_is_read_off_the_parameters(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loop = Watched(tmp_path / "log").prepare(optimizer=False)
    for (clean,) in loop.loader:
        batch = loop.batch(clean)
        loop.note(batch)
        denoising_losses(loop.model, batch).mean().backward()
        for parameter in loop.model.parameters():
            parameter.data.add_(parameter.grad, alpha=-0.01)
            parameter.grad = None
        loop.steps += 1
    table = loop.assert_rows()
    assert set(table["lr"]) == {1.0}
    assert caplog.text.count("change without a step of an optimiser that is known") == 1


def test_an_optimiser_that_was_not_prepared_counts(tmp_path: Path) -> None:
    loop = Watched(tmp_path / "log").prepare(optimizer=False)
    for (clean,) in loop.loader:
        batch = loop.batch(clean)
        loop.note(batch)
        loop.accelerator.backward(denoising_losses(loop.model, batch).mean())
        loop.step()
    np.testing.assert_allclose(loop.assert_rows()["lr"], 0.01, rtol=1e-6)


def test_steps_that_are_fused_into_the_backward_are_one_step_each(tmp_path: Path) -> None:
    loop = Watched(tmp_path / "log").prepare(optimizer=False)
    optimizers = {p: torch.optim.SGD([p], 0.01) for p in loop.model.parameters()}

    def step_and_clear(parameter: Tensor) -> None:
        optimizers[parameter].step()  # type: ignore[index]
        optimizers[parameter].zero_grad()  # type: ignore[index]

    for parameter in loop.model.parameters():
        parameter.register_post_accumulate_grad_hook(step_and_clear)
    for (clean,) in loop.loader:
        batch = loop.batch(clean)
        loop.note(batch)
        denoising_losses(loop.model, batch).mean().backward()
        loop.steps += 1
    np.testing.assert_allclose(loop.assert_rows()["lr"], 0.01, rtol=1e-6)


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
        for row, image in enumerate(clean):
            shares = torch.autograd.grad(losses[row], parameters, retain_graph=True)
            norm = torch.cat([share.flatten() for share in shares]).norm()
            loop.expected[loop.steps, round(float(image[0, 0, 0]) * 16)] = float(norm)
        loop.accelerator.backward(losses.mean())
        loop.step()
    assert loop.assert_rows()["timestep"].tolist() == drawn


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


class Ascending(torch.optim.SGD):
    """Sharpness-aware: a first backward moves to where a second one is taken."""

    @torch.no_grad()
    def climb(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["before"] = parameter.clone()
                parameter.add_(parameter.grad, alpha=0.05)
        self.zero_grad()

    @torch.no_grad()
    def go_back(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.copy_(self.state[parameter]["before"])


def test_of_two_backwards_of_a_step_the_one_that_moves_has_the_rate(tmp_path: Path) -> None:
    loop = Watched(tmp_path / "log")
    loop.optimizer = Ascending(loop.model.parameters(), 0.01)
    inner = loop.optimizer
    loop.prepare()
    norms: list[float] = []
    for (clean,) in loop.loader:
        batch = loop.batch(clean)
        for second in (False, True):
            gradients = sample_gradients(loop.model, denoising_losses, batch)
            norms += gradients.norm(dim=1).tolist()
            loop.accelerator.backward(denoising_losses(loop.model, batch).mean())
            inner.go_back() if second else inner.climb()
        loop.step()
    loop.accelerator.end_training()
    assert loop.log is not None
    table = diffhook.open_log(loop.log).train
    np.testing.assert_allclose(table["grad_norm"], norms, rtol=1e-5)
    np.testing.assert_allclose(table["lr"], ([0.0] * 4 + [0.01] * 4) * 3, rtol=1e-6)


def test_an_optimiser_without_a_rate_is_told_and_counts_every_step_alike(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers.optimization import Adafactor

    loop = Watched(tmp_path / "log")
    loop.optimizer = Adafactor(loop.model.parameters(), lr=None, relative_step=True)
    loop.prepare()
    for (clean,) in loop.loader:
        batch = loop.batch(clean)
        loop.note(batch)
        loop.accelerator.backward(denoising_losses(loop.model, batch).mean())
        loop.step()
    assert set(loop.assert_rows()["lr"]) == {1.0}
    assert caplog.text.count("has no learning rate of its own") == 1


def test_sums_in_place_of_means(tmp_path: Path) -> None:
    loop = Watched(tmp_path / "log", reduction="sum").prepare()
    for (clean,) in loop.loader:
        batch = loop.batch(clean)
        loop.note(batch)
        loop.accelerator.backward(denoising_losses(loop.model, batch).sum())
        loop.step()
    np.testing.assert_allclose(loop.assert_rows()["weight"], 1.0)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.table(tokens)
        return found


def test_rows_of_an_embedding_that_the_loop_puts_back_do_not_count(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Textual inversion: all tokens get gradients, one learns."""
    encoder = Encoder()
    frozen = TinyDenoiser().requires_grad_(False)
    loop = Watched(tmp_path / "log", encoder).prepare()
    original = encoder.table.weight.detach().clone()
    tokens = torch.tensor([[0, 4], [1, 4], [2, 4], [3, 4]])

    for (clean,) in loop.loader:
        _, noise, timesteps = loop.batch(clean)
        context = encoder(tokens[: len(clean)]).mean((1, 2))[:, None, None, None]
        losses = (frozen(clean * context, timesteps)[0] - noise).square().flatten(1).mean(1)
        for row, image in enumerate(clean):
            (share,) = torch.autograd.grad(losses[row], encoder.table.weight, retain_graph=True)
            key = loop.steps, round(float(image[0, 0, 0]) * 16)
            loop.expected[key] = float(share[4].norm())
        loop.accelerator.backward(losses.mean())
        loop.step()
        with torch.no_grad():
            encoder.table.weight[:4] = original[:4]
    loop.expected = {key: norm for key, norm in loop.expected.items() if key[0] > 0}
    loop.assert_rows()
    assert "puts most rows of table.weight back" in caplog.text


def test_a_full_standard_output_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def write(self, _: str) -> int:
            raise OSError(28, "No space left on device")

        def flush(self) -> None:
            raise OSError(28, "No space left on device")

    loop = Watched(tmp_path / "log").prepare()
    monkeypatch.setattr("sys.stdout", Full())
    for (clean,) in loop.loader:
        batch = loop.batch(clean)
        loop.note(batch)
        loop.accelerator.backward(denoising_losses(loop.model, batch).mean())
        loop.step()
    loop.assert_rows()


def test_a_probe_that_fails_ends_the_probes_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def broken(batch: Any) -> Any:
        raise KeyError("pixels")

    objective = diffhook.DiffusionObjective(SCHEDULER, inputs=broken)
    loop = Watched(tmp_path / "log", objective=objective, snapshot_every=2).prepare()
    for (clean,) in loop.loader:
        batch = loop.batch(clean)
        loop.note(batch)
        loop.accelerator.backward(denoising_losses(loop.model, batch).mean())
        loop.step()
    loop.assert_rows()
    assert caplog.text.count("probes have stopped") == 1


def test_a_hook_that_is_made_after_prepare_sees_what_was_prepared(tmp_path: Path) -> None:
    loop = Watched(None).prepare()
    loop.log = tmp_path / "log"
    DiffHook(loop.accelerator, loop.log, projection_dim=0, alerts=(), strict=True)
    for (clean,) in loop.loader:
        batch = loop.batch(clean)
        loop.note(batch)
        loop.accelerator.backward(denoising_losses(loop.model, batch).mean())
        loop.step()
    loop.assert_rows()
    assert all(len(clean) == 4 for (clean,) in loop.loader), "batches are plain again"


def test_a_gradient_penalty_is_left_out_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loop = Watched(tmp_path / "log").prepare()
    for (clean,) in loop.loader:
        clean, noise, timesteps = loop.batch(clean)
        noisy = SCHEDULER.add_noise(clean, noise, timesteps).requires_grad_()
        predicted = loop.model(noisy, timesteps)[0]
        (slope,) = torch.autograd.grad(predicted.sum(), noisy, create_graph=True)
        loop.accelerator.backward(F.mse_loss(predicted, noise) + slope.square().mean())
        loop.step()
    loop.assert_rows()
    assert caplog.text.count("depends on a gradient of the model") == 1


def test_two_timesteps_before_one_backward_are_left_out_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loop = Watched(tmp_path / "log").prepare()
    for (clean,) in loop.loader:
        both = [denoising_losses(loop.model, loop.batch(clean)).mean() for _ in range(2)]
        loop.accelerator.backward(both[0] + both[1])
        loop.step()
    loop.assert_rows()
    assert caplog.text.count("calls of the denoiser at different timesteps") == 1


def test_an_optimiser_that_takes_over_counts_on(tmp_path: Path) -> None:
    loop = Watched(tmp_path / "log").prepare()
    kept = []
    for rate in (0.01, 0.02):
        if rate > 0.01:
            kept.append(loop.optimizer)
            loop.optimizer = loop.accelerator.prepare(torch.optim.SGD(loop.model.parameters(), rate))
        for (clean,) in loop.loader:
            batch = loop.batch(clean)
            loop.note(batch)
            loop.accelerator.backward(denoising_losses(loop.model, batch).mean())
            loop.step()
    np.testing.assert_allclose(loop.assert_rows()["lr"], [0.01] * 12 + [0.02] * 12, rtol=1e-6)
