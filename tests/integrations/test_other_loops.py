"""The same rows from plain PyTorch, transformers' Trainer and Lightning; numbers for trackers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import diffhook
from diffhook.integrations.accelerate import DiffHook
from diffhook.integrations.torch import TorchHook
from tests.runs import TinyDenoiser, denoising_losses, identified

COUNT, BATCH, ACCUMULATION = 8, 2, 2


def _items() -> list[dict[str, Tensor]]:
    """Samples with noise and timestep of their own: rows do not depend on the order of draws."""
    generator = torch.Generator().manual_seed(4)
    noise = torch.randn(COUNT, 1, 8, 8, generator=generator)
    images = identified(COUNT)
    return [
        {"clean": images[i], "noise": noise[i], "timestep": torch.tensor(90 * i), "ids": torch.tensor(40 + i)}
        for i in range(COUNT)
    ]


def _losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return denoising_losses(model, (batch["clean"], batch["noise"], batch["timestep"]))


def _model() -> TinyDenoiser:
    torch.manual_seed(0)
    return TinyDenoiser()


def _rows(log: Path) -> dict[tuple[int, int], list[float]]:
    table = diffhook.open_log(log).train
    names = ("timestep", "weight", "lr", "grad_norm")
    values = np.stack([table[name] for name in names], 1)
    return {
        (step, sample): row.tolist()
        for step, sample, row in zip(table["step"].tolist(), table["sample"].tolist(), values, strict=True)
    }


def _plain(log: Path) -> dict[tuple[int, int], list[float]]:
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    loader = DataLoader(_items(), BATCH)  # type: ignore[arg-type]
    with TorchHook(log, model, optimizer, strict=True, projection_dim=32) as hook:
        for number, batch in enumerate(loader):
            with hook.step(sample_ids=batch["ids"], loss_scale=1 / ACCUMULATION):
                (_losses(model, batch).mean() / ACCUMULATION).backward()
            if (number + 1) % ACCUMULATION == 0:
                optimizer.step()
                optimizer.zero_grad()
    return _rows(log)


def _assert_same(found: dict[Any, Any], expected: dict[Any, Any]) -> None:
    assert found.keys() == expected.keys()
    for key, row in expected.items():
        np.testing.assert_allclose(found[key], row, rtol=1e-5)


def test_a_plain_loop_logs_what_an_accelerated_one_does(tmp_path: Path) -> None:
    model = _model()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATION)
    DiffHook(accelerator, tmp_path / "log", strict=True, projection_dim=32)
    loader: Any = DataLoader(_items(), BATCH)  # type: ignore[arg-type]
    prepared = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.05), loader)
    model, optimizer, loader = prepared
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(_losses(model, batch).mean())
            optimizer.step()
            optimizer.zero_grad()
    accelerator.end_training()
    _assert_same(_rows(tmp_path / "log"), _plain(tmp_path / "plain"))


def test_a_trainer_logs_what_a_plain_loop_does(tmp_path: Path) -> None:
    """It fetches all micro-batches of a step before it uses the first."""
    from transformers import Trainer, TrainingArguments

    from diffhook.integrations.transformers import DiffHookCallback

    class Denoising(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            return _losses(model, inputs).mean()

        def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            with torch.no_grad():
                return _losses(model, inputs).mean(), None, None

        def _get_train_sampler(self, *args: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATION,
        num_train_epochs=1,
        remove_unused_columns=False,
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        report_to=[],
        use_cpu=True,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        disable_tqdm=True,
    )

    def trainer(log: Path) -> Any:
        model = _model()
        optimizers = (torch.optim.SGD(model.parameters(), 0.05), None)
        made = Denoising(
            model, arguments, train_dataset=_items(), eval_dataset=_items(), optimizers=optimizers
        )  # type: ignore[arg-type]
        callback = DiffHookCallback(made, log, strict=True, projection_dim=32)
        made.add_callback(callback)
        return made

    expected = _plain(tmp_path / "plain")
    trainer(tmp_path / "log").train()
    _assert_same(_rows(tmp_path / "log"), expected)
    assert [s.step for s in diffhook.open_log(tmp_path / "log").snapshots] == [1, 2]
    trainer(tmp_path / "log").train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-1"))
    _assert_same(_rows(tmp_path / "log"), expected)


def test_lightning_logs_what_a_plain_loop_does(tmp_path: Path) -> None:
    import lightning.pytorch as pl
    from lightning.pytorch.plugins import MixedPrecision

    from diffhook.integrations.lightning import DiffHookCallback

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.unet = _model()
            self.average = _model()  # of the weights: no optimiser knows it

        def training_step(self, batch: Any, index: int) -> Any:
            return _losses(self.unet, batch).mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.unet.parameters(), 0.05)

    def fit(epochs: int, resume: Path | None = None, half: bool = False) -> Any:
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            accumulate_grad_batches=ACCUMULATION,
            callbacks=[
                DiffHookCallback(tmp_path / ("half" if half else "log"), strict=True, projection_dim=32)
            ],
            logger=False,
            plugins=MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", 2.0**8)) if half else None,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(Module(), DataLoader(_items(), BATCH), ckpt_path=resume)  # type: ignore[arg-type]
        return trainer

    trainer = fit(1)
    _assert_same(_rows(tmp_path / "log"), _plain(tmp_path / "plain"))
    fit(1, half=True)  # whose losses are scaled
    for column in ("loss", "grad_norm"):
        found, full = (diffhook.open_log(tmp_path / name).train[column] for name in ("half", "log"))
        np.testing.assert_allclose(found, full, rtol=0.02)
    saved = next((tmp_path / "checkpoints").glob("*.ckpt"))
    fit(2, saved)
    rows = _rows(tmp_path / "log")
    assert sorted({step for step, _ in rows}) == [0, 1, 2, 3]
    assert len(rows) == 2 * COUNT
    assert not any(m._forward_pre_hooks for m in trainer.model.modules())


class _Recorded(GeneralTracker):
    name = "recorded"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[tuple[int | None, dict[str, Any]]] = []

    @property
    def tracker(self) -> Any:
        return self

    def store_init_configuration(self, values: Any) -> None:
        pass

    def log(self, values: Any, step: int | None = None, **kwargs: Any) -> None:
        self.entries.append((step, values))


def test_trackers_get_a_summary_at_the_loops_own_step(tmp_path: Path) -> None:
    tracker = _Recorded()
    accelerator = Accelerator(cpu=True, log_with=tracker)
    accelerator.init_trackers("run")
    DiffHook(accelerator, tmp_path / "log", strict=True, projection_dim=0)
    data = identified()
    data[5, 0, 3, 3] = torch.nan
    model = TinyDenoiser()
    loader: Any = DataLoader(TensorDataset(data), 2)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.0), loader)
    for number, (clean,) in enumerate(loader):
        batch = (clean, torch.ones_like(clean), torch.zeros(2).long())
        accelerator.backward(denoising_losses(model, batch).mean())
        if number != 2:  # a guard against bad losses
            optimizer.step()
        optimizer.zero_grad()
        if number % 3 == 2:
            accelerator.log({"loss": 1.0}, step=100 + number)
    accelerator.end_training()
    assert [step for step, _ in tracker.entries] == [102, 105], "never per sample, never back"
    ours = [values for _, values in tracker.entries]
    assert all(values["loss"] == 1.0 for values in ours)
    assert ours[0]["diffhook/alerts"] == 1
    assert ours[0]["diffhook/alerts_non-finite"] == 1
    assert ours[1]["diffhook/alerts"] == 0
    assert np.isfinite(ours[0]["diffhook/grad_norm_median"])
