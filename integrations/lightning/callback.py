"""DiffHook in a Lightning Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from diffhook.capture.loop.call_inspection import scale_of
from diffhook.capture.loop.identity import RowIds
from diffhook.capture.loop.models import sharded
from diffhook.integrations.torch import TorchHook
from diffhook.log.store import Location

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError("DiffHookCallback needs Lightning: pip install diffhook[lightning]") from error


class DiffHookCallback(Callback):
    """Watches the models that a LightningModule trains, by automatic optimisation.

    Batches must hold their samples' ids, see ``sample_ids`` of
    :class:`~diffhook.capture.settings.Settings`: Lightning does not show which indices of
    the dataset they come from.

    Example:
        >>> Trainer(callbacks=[DiffHookCallback("runs/butterflies")]).fit(module, loader)

    Args:
        path: the log.
        models: module → the trained models; by default its children that the optimiser trains.
        settings: see :class:`~diffhook.capture.settings.Settings`.

    Raises:
        ConfigurationError: at the start of training, for a strategy that shards parameters.
    """

    def __init__(
        self,
        path: Location,
        *,
        models: Callable[[LightningModule], Iterable[nn.Module]] | None = None,
        **settings: Any,
    ) -> None:
        self.hook = TorchHook(path, **settings)
        self._models = models or _trained_children
        self._loss: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        kind = type(trainer.strategy).__name__
        if any(word in kind for word in ("FSDP", "DeepSpeed", "ModelParallel")):
            raise sharded(kind)
        self.hook.session.rank, self.hook.session.processes = trainer.global_rank, trainer.world_size
        for model in self._models(pl_module):
            self.hook.watch(model)
        self.hook.watch(trainer.optimizers[0])

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        with self.hook.guarded():
            found = self.hook.identity.of(batch)
            self.hook.session.batch(found.ids if isinstance(found, RowIds) else None, batch=batch)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._loss = float(loss.detach()) if self.hook.session.in_pass else None

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        scale = scale_of(getattr(trainer.precision_plugin, "scaler", None))
        micro_batches = trainer.accumulate_grad_batches
        with self.hook.guarded():
            # What Lightning shows is divided by the micro-batches and scaled already.
            loss = None if self._loss is None else self._loss * micro_batches / scale
            self.hook.session.backward(loss, scale, 1 / micro_batches)

    def state_dict(self) -> dict[str, Any]:
        return self.hook.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.hook.load_state_dict(state_dict)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.hook.close()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.hook.close()


def _trained_children(module: LightningModule) -> list[nn.Module]:
    groups = [group for optimizer in module.trainer.optimizers for group in optimizer.param_groups]
    trained = {id(parameter) for group in groups for parameter in group["params"]}
    return [child for child in module.children() if any(id(p) in trained for p in child.parameters())]
