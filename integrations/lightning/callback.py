"""DiffHook in a Lightning Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from diffhook.capture.loop import Capture, events
from diffhook.capture.loop.watches.attachment import shielded
from diffhook.capture.loop.watches.optimizers import scale_of
from diffhook.capture.settings import Settings
from diffhook.gradients.sharding import refusal
from diffhook.log.store import Location

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError("DiffHookCallback needs Lightning: pip install 'diffhook[lightning]'") from error


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
        self.capture = Capture(path, Settings.of(settings))
        self._models = models or _trained_children

    @shielded()
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        kind = type(trainer.strategy).__name__
        if any(word in kind for word in ("FSDP", "DeepSpeed", "ModelParallel")):
            raise refusal(f"diffhook has not been seen to work with Lightning's {kind}")
        self.capture.place(trainer.global_rank, trainer.world_size)
        self.capture.watch(*self._models(pl_module), trainer.optimizers[0])

    @shielded()
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.capture.on(events.BatchReceived(self.capture.identity.of(batch), batch))

    @shielded()
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if not self.capture.session.in_pass:  # to ask a scaler is to wait for its device
            return
        scale = scale_of(getattr(trainer.precision_plugin, "scaler", None))
        self.capture.on(events.LossScaled(scale, 1 / trainer.accumulate_grad_batches))

    @shielded(dict)
    def state_dict(self) -> dict[str, Any]:
        return self.capture.state()

    @shielded()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.capture.resume(state_dict)

    @shielded(again=True)
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.capture.close()

    @shielded(again=True)
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.capture.close()


def _trained_children(module: LightningModule) -> list[nn.Module]:
    groups = [group for optimizer in module.trainer.optimizers for group in optimizer.param_groups]
    trained = {id(parameter) for group in groups for parameter in group["params"]}
    return [child for child in module.children() if any(id(p) in trained for p in child.parameters())]
