"""However a loop writes its loss, the loss column is that of each sample alone."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import EulerDiscreteScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import diffhook
from diffhook.integrations.accelerate import DiffHook
from diffhook.log.samples import split_id
from tests.runs import SCHEDULER, TinyDenoiser, identified
from tests.twins import double, rows

Batch = dict[str, Tensor]
Loss = Callable[[Any, Batch], Tensor]
SAMPLER = EulerDiscreteScheduler.from_config(SCHEDULER.config)


def _noisy(batch: Batch) -> Tensor:
    return SCHEDULER.add_noise(batch["clean"], batch["noise"], batch["timesteps"])


def _by(distance: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    return lambda model, batch: distance(model(_noisy(batch), batch["timesteps"])[0], batch["noise"])


def _sigmas(batch: Batch) -> Tensor:
    """Not so near 0 that the loop itself loses digits."""
    return 0.1 + 0.9 * batch["timesteps"].to(batch["clean"].dtype).view(-1, 1, 1, 1) / 1000


def stable_diffusion_3(model: Any, batch: Batch) -> Tensor:
    """As train_dreambooth_lora_sd3.py by default."""
    sigmas = _sigmas(batch)
    noisy = (1.0 - sigmas) * batch["clean"] + sigmas * batch["noise"]
    predicted = model(noisy, batch["timesteps"])[0] * (-sigmas) + noisy
    weighting = sigmas**-2.0
    errors = weighting * (predicted - batch["clean"]) ** 2
    return torch.mean(errors.reshape(len(errors), -1), 1).mean()


def edm(model: Any, batch: Batch, adapter: Any = None) -> Tensor:
    """As train_dreambooth_lora_sdxl.py --do_edm_style_training and train_t2i_adapter_sdxl.py."""
    kept = SCHEDULER.alphas_cumprod.to(batch["clean"].dtype)[batch["timesteps"]].view(-1, 1, 1, 1)
    sigmas = ((1 - kept) / kept).sqrt()
    noisy = batch["clean"] + sigmas * batch["noise"]
    given = noisy / (sigmas**2 + 1).sqrt()
    if adapter is not None:
        given = given + adapter(batch["clean"])
    denoised = model(given, batch["timesteps"])[0] * (-sigmas) + noisy
    return (sigmas**-2.0 * (denoised - batch["clean"]) ** 2).reshape(len(noisy), -1).mean(1).mean()


def pseudo_huber(model: Any, batch: Batch) -> Tensor:
    """As train_text_to_image_lora.py of old, and kohya's, with a c for each timestep."""
    c = torch.exp(-3 * batch["timesteps"].to(batch["clean"].dtype) / 1000).view(-1, 1, 1, 1)
    error = model(_noisy(batch), batch["timesteps"])[0] - batch["noise"]
    return (2 * c * (torch.sqrt(error**2 + c**2) - c)).mean()


def min_snr(model: Any, batch: Batch) -> Tensor:
    kept = SCHEDULER.alphas_cumprod.to(batch["clean"].dtype)[batch["timesteps"]]
    snr = kept / (1 - kept)
    errors = F.mse_loss(model(_noisy(batch), batch["timesteps"])[0], batch["noise"], reduction="none")
    return (errors.mean(dim=[1, 2, 3]) * snr.clamp(max=5) / snr).mean()


def dream(model: Any, batch: Batch) -> Tensor:
    """The target is drawn to what the model predicts without a gradient."""
    with torch.no_grad():
        difference = batch["noise"] - model(_noisy(batch), batch["timesteps"])[0]
    kept = SCHEDULER.alphas_cumprod.to(difference.dtype)[batch["timesteps"]].view(-1, 1, 1, 1)
    share = (1 - kept).sqrt()
    noisy = _noisy(batch) + share**2 * difference
    return F.mse_loss(model(noisy, batch["timesteps"])[0], batch["noise"] + share * difference)


def masked(model: Any, batch: Batch) -> Tensor:
    """As train_custom_diffusion.py."""
    errors = F.mse_loss(model(_noisy(batch), batch["timesteps"])[0], batch["noise"], reduction="none")
    mask = (batch["clean"] > 0).to(errors.dtype)
    return ((errors * mask).sum([1, 2, 3]) / mask.sum([1, 2, 3])).mean()


def several_terms(model: Any, batch: Batch) -> Tensor:
    error = model(_noisy(batch), batch["timesteps"])[0] - batch["noise"]
    return error.square().mean() + 0.3 * error.abs().mean()


def in_parts(model: Any, batch: Batch) -> Tensor:
    predicted = model(_noisy(batch), batch["timesteps"])[0]
    halves = list(zip(predicted.chunk(2), batch["noise"].chunk(2), strict=False))
    sums = [F.mse_loss(one, other, reduction="sum") for one, other in reversed(halves)]
    return torch.stack(sums).sum() / predicted.numel()


class WithVariance(TinyDenoiser):
    """Predicts variances in a further channel."""

    def __init__(self) -> None:
        super().__init__()
        self.outward = nn.Conv2d(6, 2, 3, padding=1)


def first_channels(model: Any, batch: Batch) -> Tensor:
    predicted = model(_noisy(batch), batch["timesteps"])[0].chunk(2, dim=1)[0]
    return F.mse_loss(predicted, batch["noise"])


LOSSES: dict[str, Loss] = {
    "squared": _by(F.mse_loss),
    "squared, the target first": _by(lambda one, other: F.mse_loss(other, one)),
    "stable diffusion 3": stable_diffusion_3,
    "edm": edm,
    "absolute": _by(F.l1_loss),
    "smooth": _by(lambda one, other: F.smooth_l1_loss(one, other, beta=0.5)),
    "huber": _by(lambda one, other: F.huber_loss(other, one, delta=0.7)),
    "pseudo-huber": pseudo_huber,
    "min-snr": min_snr,
    "dream": dream,
    "masked": masked,
    "several terms": several_terms,
    "in parts": in_parts,
    "first channels": first_channels,
}


def train(
    log: Path, loss: Loss, *, frozen: nn.Module | None = None, accumulation: int = 1, **options: Any
) -> dict[tuple[int, int], float]:
    """Returns (step, sample) → the loss of that sample alone, in float64. ``frozen`` trains an adapter."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    hook = DiffHook(
        accelerator, log, strict=True, projection_dim=0, alerts=(), every=1, probe=False, **options
    )
    model: Any = nn.Conv2d(1, 1, 3, padding=1) if frozen is not None else TinyDenoiser()
    model = WithVariance() if loss is first_channels else model
    optimizer: Any = torch.optim.SGD(model.parameters(), 1e-2)
    loader = DataLoader(TensorDataset(identified()), 4, shuffle=True)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    expected = {}
    for _ in range(2):
        for (clean,) in loader:
            timesteps = torch.randint(0, 1000, (len(clean),))
            batch = {"clean": clean, "noise": torch.randn_like(clean), "timesteps": timesteps}
            twins = [copy.deepcopy(each).double() for each in (model, frozen) if each is not None]
            for row, sample in enumerate((16 * clean[:, 0, 0, 0]).round().long().tolist()):
                alone = rows(double(batch), slice(row, row + 1))
                with torch.no_grad():
                    expected[hook.step_count, sample] = float(_call(loss, alone, *twins))
            with accelerator.accumulate(prepared):
                accelerator.backward(_call(loss, batch, prepared, *([] if frozen is None else [frozen])))
                optimizer.step()
                optimizer.zero_grad()
    accelerator.end_training()
    return expected


def _call(loss: Any, batch: Batch, model: Any, frozen: Any = None) -> Tensor:
    value: Tensor = loss(model, batch) if frozen is None else loss(frozen, batch, model)
    return value


def _compare(log: Path, expected: dict[tuple[int, int], float]) -> None:
    table = diffhook.open_log(log).train
    keys = list(zip(table["step"].tolist(), table["sample"].tolist(), strict=True))
    assert sorted(keys) == sorted(expected)
    np.testing.assert_allclose(table["loss"], [expected[key] for key in keys], rtol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_is_that_of_the_batch_1_loop_from_the_first_row_on(name: str, tmp_path: Path) -> None:
    _compare(tmp_path / "log", train(tmp_path / "log", LOSSES[name]))


def _with(term: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    """A squared error and, a hundredth of it or less, another term of the prediction."""

    def loss(model: Any, batch: Batch) -> Tensor:
        predicted = model(_noisy(batch), batch["timesteps"])[0]
        return F.mse_loss(predicted, batch["noise"]) + 1e-3 * term(predicted, batch["noise"])

    return loss


@pytest.mark.parametrize(
    "term",
    [
        lambda predicted, noise: predicted.exp().mean(),
        lambda predicted, noise: ((noise.mean() - noise) ** 2 / predicted.exp()).mean(),
        lambda predicted, noise: predicted.sigmoid().log().neg().mean(),
    ],
    ids=["exponential", "likelihood", "entropy"],
)
def test_a_loss_with_a_further_term_of_the_prediction_is_not_taken_for_its_error(
    term: Callable[[Tensor, Tensor], Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its mean over the batch may be that of the errors, as far as a comparison shows; the rows' are not."""
    with caplog.at_level(logging.WARNING, "diffhook"):
        train(tmp_path / "log", _with(term))
    assert np.isnan(diffhook.open_log(tmp_path / "log").train["loss"]).all()
    assert "samples' own losses are not known" in caplog.text


@pytest.mark.parametrize("name", ["edm", "absolute"])
def test_while_accumulating(name: str, tmp_path: Path) -> None:
    expected = train(tmp_path / "log", LOSSES[name], accumulation=3)
    _compare(tmp_path / "log", expected)


def test_an_adapter_behind_a_frozen_denoiser(tmp_path: Path) -> None:
    frozen = TinyDenoiser().requires_grad_(False)
    _compare(tmp_path / "log", train(tmp_path / "log", edm, frozen=frozen))


@pytest.mark.parametrize(
    "order",
    [lambda rows: rows.flip(0), lambda rows: torch.cat(rows.chunk(2)[::-1]), lambda rows: rows[[2, 0, 1, 3]]],
)
def test_a_loss_of_moved_rows_is_never_anothers(order: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    """Only where it is plain, the output's own gradient tells."""

    def weighted(model: Any, batch: Batch) -> Tensor:
        predicted = model(_noisy(batch), batch["timesteps"])[0]
        if len(predicted) == 1:
            return F.mse_loss(predicted, batch["noise"])
        return F.mse_loss(order(predicted), order(batch["noise"]))

    _compare(tmp_path / "log", train(tmp_path / "log", weighted))


# ── prior preservation ────────────────────────────────────────────────────────────────────────────


def _prior(log: Path, power: int = 2, weight: float = 0.5, preconditioned: bool = False) -> dict[Any, float]:
    """As train_custom_diffusion.py: the instance images' error is masked, that of class images is not.

    Returns (sample, role) → loss of the row alone, in float64.
    """
    torch.manual_seed(0)
    data, other = identified(), identified() + 3
    accelerator = Accelerator(cpu=True)
    DiffHook(accelerator, log, strict=True, projection_dim=0, alerts=(), every=1, probe=False)
    model: Any = TinyDenoiser()
    items: Any = [{"image": data[i], "class": other[i]} for i in range(12)]
    loader = DataLoader(
        items,
        4,
        collate_fn=lambda items: torch.stack([i["image"] for i in items] + [i["class"] for i in items]),
    )
    optimizer: Any = torch.optim.SGD(model.parameters(), 1e-2)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    def errors(model: Any, batch: Batch) -> Tensor:
        predicted, target = model(_noisy(batch), batch["timesteps"])[0], batch["noise"]
        if preconditioned:
            predicted, target = predicted * -_sigmas(batch) + batch["clean"], batch["clean"]
        return torch.cat(
            [(p - t) ** power for p, t in zip(predicted.chunk(2), target.chunk(2), strict=False)]
        )

    def own(values: Tensor, clean: Tensor) -> Tensor:
        mask = (clean > 0).to(values.dtype)
        return (values * mask).sum([1, 2, 3]) / mask.sum([1, 2, 3])

    expected = {}
    for number, clean in enumerate(loader):
        batch = {"clean": clean, "noise": torch.randn_like(clean), "timesteps": torch.randint(0, 1000, (8,))}
        twin = copy.deepcopy(model).double()
        for row in range(8):
            alone = rows(double(batch), slice(row, row + 1))
            with torch.no_grad():
                value = errors(twin, alone)
            loss = weight * value.mean() if row >= 4 else own(value, alone["clean"])
            expected[4 * number + row % 4, row // 4] = float(loss)
        instance, prior = errors(prepared, batch).chunk(2)
        accelerator.backward(own(instance, clean[:4]).mean() + weight * prior.mean())
        optimizer.step()
        optimizer.zero_grad()
    accelerator.end_training()
    return expected


@pytest.mark.parametrize("preconditioned", [False, True])
def test_prior_preservation_with_a_masked_loss(
    preconditioned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = _prior(tmp_path / "log", preconditioned=preconditioned)
    table = diffhook.open_log(tmp_path / "log").train
    keys = [split_id(sample) for sample in table["sample"].tolist()]
    assert sorted(keys) == sorted(expected)
    np.testing.assert_allclose(table["loss"], [expected[key] for key in keys], rtol=1e-5)
    assert "couples a sample's rows" not in caplog.text


def test_class_images_under_a_loss_that_is_not_known_are_no_pairs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "diffhook"):
        _prior(tmp_path / "log", power=4)
    assert np.isnan(diffhook.open_log(tmp_path / "log").train["loss"]).all()
    assert "samples' own losses are not known" in caplog.text
    assert "couples a sample's rows" not in caplog.text
