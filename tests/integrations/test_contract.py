"""Every adapter keeps the contract of the loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from diffhook.capture.loop.testing import LoopContract, items, losses_of
from diffhook.integrations.accelerate import DiffHook
from diffhook.integrations.torch import TorchHook


class TestTorch(LoopContract):
    def train(self, model: nn.Module, log: Path | None, folder: Path) -> None:
        optimizer = torch.optim.SGD(model.parameters(), self.lr)
        hook = TorchHook(folder / "off" if log is None else log, enabled=log is not None, projection_dim=0)
        hook.watch(model, optimizer)
        loader: Any = DataLoader(items(), self.batch)  # type: ignore[arg-type]
        for number, batch in enumerate(loader):
            with hook.step(sample_ids=batch["ids"], loss_scale=1 / self.accumulation):
                (losses_of(model, batch).mean() / self.accumulation).backward()
            if (number + 1) % self.accumulation == 0:
                optimizer.step()
                optimizer.zero_grad()
        hook.close()


class TestAccelerate(LoopContract):
    def train(self, model: nn.Module, log: Path | None, folder: Path) -> None:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=self.accumulation)
        if log is not None:
            DiffHook(accelerator, log, projection_dim=0)
        optimizer: Any = torch.optim.SGD(model.parameters(), self.lr)
        loader: Any = DataLoader(items(), self.batch)  # type: ignore[arg-type]
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(losses_of(model, batch).mean())
                optimizer.step()
                optimizer.zero_grad()
        accelerator.end_training()


class TestTransformers(LoopContract):
    def train(self, model: nn.Module, log: Path | None, folder: Path) -> None:
        from transformers import Trainer, TrainingArguments

        from diffhook.integrations.transformers import DiffHookCallback

        class Denoising(Trainer):
            def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
                return losses_of(model, inputs).mean()

            def _get_train_sampler(self, *args: Any) -> Any:
                return torch.utils.data.SequentialSampler(self.train_dataset)

        arguments = TrainingArguments(
            output_dir=str(folder / "out"),
            per_device_train_batch_size=self.batch,
            gradient_accumulation_steps=self.accumulation,
            num_train_epochs=1,
            remove_unused_columns=False,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            disable_tqdm=True,
        )
        optimizers = (torch.optim.SGD(model.parameters(), self.lr), None)
        trainer = Denoising(model, arguments, train_dataset=items(), optimizers=optimizers)  # type: ignore[arg-type]
        if log is not None:
            trainer.add_callback(DiffHookCallback(trainer, log, projection_dim=0))
        trainer.train()


class TestLightning(LoopContract):
    def train(self, model: nn.Module, log: Path | None, folder: Path) -> None:
        import lightning.pytorch as pl

        from diffhook.integrations.lightning import DiffHookCallback

        lr = self.lr

        class Module(pl.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.denoiser = model

            def training_step(self, batch: Any, index: int) -> Any:
                return losses_of(self.denoiser, batch).mean()

            def configure_optimizers(self) -> Any:
                return torch.optim.SGD(self.denoiser.parameters(), lr)

        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=1,
            accumulate_grad_batches=self.accumulation,
            callbacks=[] if log is None else [DiffHookCallback(log, projection_dim=0)],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            default_root_dir=folder,
        )
        trainer.fit(Module(), DataLoader(items(), self.batch))  # type: ignore[arg-type]
