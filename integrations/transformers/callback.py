"""DiffHook in transformers' Trainer, which runs on Accelerate but fetches, saves and ends on its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from diffhook.capture.loop.identity import RowIds
from diffhook.capture.loop.origin import Origin
from diffhook.integrations.accelerate import DiffHook
from diffhook.log.store import Location

try:
    from transformers import Trainer, TrainerCallback
except ImportError as error:
    raise ImportError("DiffHookCallback needs transformers: pip install transformers") from error


class DiffHookCallback(TrainerCallback):
    """Watches a ``Trainer`` whose ``compute_loss`` calls a model on timesteps.

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
        self.hook = _TrainerHook(trainer, path, **settings)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step:
            self.hook.load(_folder(args, state))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.hook.save(_folder(args, state))

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.hook.forget_batches()

    def on_predict(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> None:
        self.hook.forget_batches()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.hook.close()


class _TrainerHook(DiffHook):
    """A Trainer fetches all micro-batches of a step before the first is used: so ids wait for theirs."""

    def __init__(self, trainer: Trainer, path: Location, **settings: Any) -> None:
        super().__init__(trainer.accelerator, path, **settings)
        self._trainer = trainer
        self._waiting: dict[int, Tensor] = {}  # id() of a batch → sample ids
        if not self.closed:
            self.replace(trainer, "training_step", self._training_step)

    def _on_batch(self, batch: Any, origin: Origin) -> None:
        with self.guarded():
            found = None if batch is None else self.identity.of(batch, origin)
            if isinstance(found, RowIds):
                self._waiting[id(batch)] = found.ids
                self.note(found.ids, origin)

    def forget_batches(self) -> None:
        """Those of an evaluation were not trained on."""
        self._waiting.clear()

    def _training_step(
        self, original: Callable[..., Any], model: Any, inputs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        with self.guarded():
            self.session.batch(self._waiting.pop(id(inputs), None), batch=inputs)
        return original(model, inputs, *args, **kwargs)

    def loss_divided_by(self) -> float:
        usual = self._trainer.args.gradient_accumulation_steps  # of an older Trainer, at an epoch's end too
        return float(getattr(self._trainer, "current_gradient_accumulation_steps", usual))


def _folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir, f"checkpoint-{state.global_step}")
