"""DiffHook in transformers' Trainer, which runs on Accelerate but fetches, saves and ends on its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffhook.capture.loop import events
from diffhook.capture.loop.identity.early_batches import EarlyBatches
from diffhook.capture.loop.watches.attachment import shielded
from diffhook.capture.settings import Settings
from diffhook.integrations.accelerate.accelerator_events import AcceleratorEvents, capture_on
from diffhook.log.store import Location

try:
    from transformers import Trainer, TrainerCallback
except ImportError as error:
    raise ImportError("DiffHookCallback needs transformers: pip install transformers") from error


class DiffHookCallback(TrainerCallback):
    """Watches a ``Trainer`` whose ``compute_loss`` calls a model on timesteps.

    A Trainer fetches all micro-batches of a step before the first is used: each waits for its own turn.

    Example:
        >>> trainer = Trainer(...)
        >>> trainer.add_callback(DiffHookCallback(trainer, "runs/butterflies"))
        >>> trainer.train()

    Args:
        trainer: before ``train()``.
        path: the log.
        settings: see :class:`~diffhook.capture.settings.Settings`.
    """

    def __init__(self, trainer: Trainer, path: Location, **settings: Any) -> None:
        accelerator = trainer.accelerator
        self.capture = capture_on(accelerator, path, Settings.of(settings))
        self._trainer = trainer
        self._batches = EarlyBatches()
        self._events = AcceleratorEvents(
            accelerator, self.capture, keeper=self, deliver=self._keep, loss_divided_by=self._loss_divided_by
        )
        if not self.capture.closed:
            self.capture.attachment.replace(trainer, "training_step", before=self._before_training_step)

    def _keep(self, batch: Any, event: events.Event) -> None:
        if isinstance(event, events.BatchReceived):
            self._batches.keep(batch, event.ids)

    def _before_training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> None:
        self.capture.on(events.BatchReceived(self._batches.find(inputs), inputs))

    def _loss_divided_by(self) -> float:
        usual = self._trainer.args.gradient_accumulation_steps  # of an older Trainer, at an epoch's end too
        return float(getattr(self._trainer, "current_gradient_accumulation_steps", usual))

    @shielded()
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step:
            self._events.load(_folder(args, state))

    @shielded()
    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._events.save(_folder(args, state))

    @shielded()
    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._batches.clear()

    @shielded()
    def on_predict(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> None:
        self._batches.clear()

    @shielded(again=True)
    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.capture.close()


def _folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir, f"checkpoint-{state.global_step}")
