"""Loops that slip: each row is right all the same, or absent and told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import diffhook
from diffhook.integrations.accelerate import DiffHook
from tests.integrations.watched import Watched
from tests.runs import SCHEDULER, TinyDenoiser, denoising_losses
from tests.twins import sample_gradients

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
    loop.epoch()
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
    loop.epoch()
    assert set(loop.assert_rows()["lr"]) == {1.0}
    assert caplog.text.count("has no learning rate of its own") == 1


def test_a_mean_that_python_adds_up_is_a_mean(tmp_path: Path) -> None:
    loop = Watched(tmp_path / "log").prepare()
    for (clean,) in loop.loader:
        batch = loop.batch(clean)
        loop.note(batch)
        losses = denoising_losses(loop.model, batch)
        loop.accelerator.backward(sum(losses) / len(losses))  # type: ignore[arg-type]
        loop.step()
    np.testing.assert_allclose(loop.assert_rows()["weight"], 1 / 4)


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


def _train_encoder(loop: Watched, *, restore: bool) -> Watched:
    """Textual inversion: all tokens get gradients, one learns."""
    encoder = loop.model
    frozen = TinyDenoiser().requires_grad_(False)
    original = encoder.table.weight.detach().clone()
    tokens = torch.tensor([[0, 4], [1, 4], [2, 4], [3, 4]])
    for (clean,) in loop.loader:
        _, noise, timesteps = loop.batch(clean)
        context = encoder(tokens[: len(clean)]).mean((1, 2))[:, None, None, None]
        losses = (frozen(clean * context, timesteps)[0] - noise).square().flatten(1).mean(1)
        for row, image in enumerate(clean):
            (share,) = torch.autograd.grad(losses[row], encoder.table.weight, retain_graph=True)
            key = loop.steps, round(float(image[0, 0, 0]) * 16)
            loop.expected[key] = float((share[4] if restore else share).norm())
        loop.accelerator.backward(losses.mean())
        loop.step()
        with torch.no_grad():
            encoder.table.weight[: 4 if restore else 0] = original[: 4 if restore else 0]
    return loop


def test_rows_of_an_embedding_that_the_loop_puts_back_do_not_count(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loop = _train_encoder(Watched(tmp_path / "log", Encoder()).prepare(), restore=True)
    loop.expected = {key: norm for key, norm in loop.expected.items() if key[0] > 0}
    loop.assert_rows()
    assert "puts most rows of table.weight back" in caplog.text


@pytest.mark.parametrize("end", ["save_state", "flush", "end_training"])
@pytest.mark.parametrize("restore", [False, True])
def test_whether_an_embedding_is_put_back_is_settled_before_a_checkpoint_and_the_end(
    restore: bool, end: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows of the first steps wait for the next captured one, which may be far away."""
    loop = Watched(tmp_path / "log", Encoder(), every=10).prepare()
    _train_encoder(loop, restore=restore)
    ends = {
        "save_state": lambda: loop.accelerator.save_state(str(tmp_path / "checkpoint")),
        "flush": loop.hook.flush,
        "end_training": loop.accelerator.end_training,
    }
    ends[end]()
    loop.expected = {} if restore else {key: norm for key, norm in loop.expected.items() if key[0] == 0}
    assert len(diffhook.open_log(tmp_path / "log").train["sample"]) == len(loop.expected)
    loop.assert_rows()
    assert f"diffhook: {0 if restore else 4} rows" in capsys.readouterr().out


def test_a_full_standard_output_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def write(self, _: str) -> int:
            raise OSError(28, "No space left on device")

        def flush(self) -> None:
            raise OSError(28, "No space left on device")

    loop = Watched(tmp_path / "log").prepare()
    monkeypatch.setattr("sys.stdout", Full())
    loop.epoch()
    loop.assert_rows()


def test_a_probe_that_fails_ends_the_probes_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def broken(batch: Any) -> Any:
        raise KeyError("pixels")

    objective = diffhook.DiffusionObjective(SCHEDULER, inputs=broken)
    probe = diffhook.Probe(4)
    loop = Watched(tmp_path / "log", objective=objective, probe=probe, snapshot_every=2).prepare()
    loop.epoch()
    loop.assert_rows()
    assert caplog.text.count("probes have stopped") == 1


def test_a_hook_that_is_made_after_prepare_sees_what_was_prepared(tmp_path: Path) -> None:
    loop = Watched(None).prepare()
    loop.log = tmp_path / "log"
    DiffHook(loop.accelerator, loop.log, projection_dim=0, alerts=(), strict=True)
    loop.epoch()
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
        loop.epoch()
    np.testing.assert_allclose(loop.assert_rows()["lr"], [0.01] * 12 + [0.02] * 12, rtol=1e-6)


def test_an_iterator_from_before_prepare_is_told_as_what_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loop = Watched(tmp_path / "log")
    unprepared = iter(loop.loader)
    loop.prepare()
    for (clean,) in unprepared:
        loop.accelerator.backward(denoising_losses(loop.model, loop.batch(clean)).mean())
        loop.step()
    loop.accelerator.end_training()
    assert caplog.text.count("iterate over the loader that prepare returns") == 1
    assert "every micro-batch was left out (3 unprepared)" in caplog.text
