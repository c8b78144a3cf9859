"""DiffHook: two lines in an Accelerate training loop."""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import Tensor, nn

from diffhook.capture import Alerts, Detector, Objective, Probe, Quarantine
from diffhook.capture.loop.call_inspection import scale_of
from diffhook.capture.loop.checkpoint import read_state, write_state
from diffhook.capture.loop.identity import RowIds, Unmatched
from diffhook.capture.loop.loader_tracker import LoaderTracker
from diffhook.capture.loop.models import is_trained, refuse_compiled, sharded
from diffhook.capture.loop.origin import Origin
from diffhook.integrations.accelerate import loaders, quarantine
from diffhook.integrations.notify import Trackers
from diffhook.integrations.torch import TorchHook
from diffhook.log.store import Location

_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


class DiffHook(TorchHook):
    """Watches an Accelerate training loop and logs per-sample gradients.

    Example:
        >>> accelerator = Accelerator()
        >>> hook = DiffHook(accelerator, "runs/butterflies")  # before accelerator.prepare()

    The loop stays as it is. The hook learns of the models, optimiser and data from ``prepare``, of
    timesteps from the models' arguments, of the backward from ``accelerator.backward``. Training
    results are bit-identical with and without it. An error of ours is logged once and ends the
    capture, not the training. It ends with ``accelerator.end_training()``, :meth:`close`, a ``with``
    block or the interpreter; the accelerator keeps it, so a notebook's cell need not.

    After an error in the loop it waits, and the loop may go on. Run the cell again instead, and the
    new hook on the same accelerator or model sees the old one off; so does dropping the accelerator.
    What had been captured stays in the log.

    Args:
        accelerator: the loop's.
        path: the log: a folder, an fsspec URL, or a zarr Store.
        projection_dim, seed, every, overhead, snapshot_every, keep_preconditioner, probe, objective, alerts,
            sample_ids, thumbnails, reuse_products, workspace, strict, enabled: see
            :class:`~diffhook.capture.settings.Settings`.

    Raises:
        ConfigurationError: an option out of range, or parameters sharded over processes.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        path: Location,
        *,
        projection_dim: int | Literal["full"] = 2048,
        seed: int = 0,
        every: int = 1,
        overhead: float | None = None,
        snapshot_every: int | None = None,
        keep_preconditioner: bool = False,
        probe: Probe | None = None,
        objective: Objective | None = None,
        alerts: Alerts | Sequence[Detector] | None = None,
        sample_ids: str | Callable[[Any], Any] | Literal[False] | None = None,
        thumbnails: int = 0,
        reuse_products: bool = False,
        workspace: int | None = None,
        strict: bool = False,
        enabled: bool = True,
    ) -> None:
        kind = accelerator.distributed_type
        if enabled and kind in _SHARDED:
            raise sharded(kind.value)
        super().__init__(
            path,
            rank=accelerator.process_index,
            processes=accelerator.num_processes,
            projection_dim=projection_dim,
            seed=seed,
            every=every,
            overhead=overhead,
            snapshot_every=snapshot_every,
            keep_preconditioner=keep_preconditioner,
            probe=probe,
            objective=objective,
            alerts=Alerts.of(alerts, Trackers(weakref.proxy(accelerator))),  # their threads outlast it
            sample_ids=sample_ids,
            thumbnails=thumbnails,
            reuse_products=reuse_products,
            workspace=workspace,
            strict=strict,
            enabled=enabled,
        )
        self.accelerator = accelerator
        self._data = LoaderTracker()
        self._unmatched: Unmatched | None = None  # why the last batch's samples are not known
        if enabled:
            self._attach()

    def _attach(self) -> None:
        accelerator = self.accelerator
        self.claim(accelerator)
        accelerator.__dict__["_diffhook"] = self  # so that the loop need not keep us
        self.later(functools.partial(accelerator.__dict__.pop, "_diffhook", None))
        self.replace(accelerator, "prepare", self._prepare)
        self.replace(accelerator, "backward", self._backward)
        self.replace(accelerator, "log", self._log)
        self.replace(accelerator, "end_training", self._end_training)
        saving = accelerator.register_save_state_pre_hook(lambda models, weights, folder: self.save(folder))
        loading = accelerator.register_load_state_pre_hook(lambda models, folder: self.load(folder))
        self.later(saving.remove)
        self.later(loading.remove)
        loaders.listen(self._on_batch)
        self.later(functools.partial(loaders.unlisten, self._on_batch))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """A checkpoint is being written to ``folder``; ``accelerator.save_state`` calls this."""
        state = self.state_dict()
        with self.guarded():
            if self.accelerator.is_main_process:
                write_state(folder, state)

    def load(self, folder: str | os.PathLike[str]) -> None:
        """Training goes on from a checkpoint; ``accelerator.load_state`` calls this."""
        with self.guarded():
            self.load_state_dict(read_state(folder))

    @property
    def quarantine(self) -> Quarantine:
        """The samples that are left out, to add to and remove from by hand.

        Raises:
            ConfigurationError: quarantine is off.
        """
        return quarantine.of(self.alerts)

    # ── what accelerate does ──────────────────────────────────────────────────────────────────

    def _prepare(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = tuple(loaders.tag(a) if loaders.can_tag(a) else a for a in args)
        prepared = original(*given, **kwargs)
        results = prepared if len(args) > 1 else (prepared,)
        for argument, tagged, result in zip(args, given, results, strict=True):
            if tagged is not argument:
                self.identity.datasets.add(argument.dataset)
                if self._loader is None:
                    self._loader, self._data.first = argument, argument.dataset
                self.later(functools.partial(loaders.untag, result))
                self.later(quarantine.leave_out(result, self.alerts, self._data, self.identity))
        with self.guarded():
            for result in results:
                self._discover(result)
        return prepared

    def _discover(self, result: Any) -> None:
        if isinstance(result, nn.Module) and is_trained(result):
            refuse_compiled(result)
            self.watch(self.accelerator.unwrap_model(result))
        if isinstance(result, AcceleratedOptimizer):
            self.watch(result.optimizer)

    def _on_batch(self, batch: Any, origin: Origin) -> None:
        with self.guarded():
            found = None if batch is None else self.identity.of(batch, origin)
            ids = found.ids if isinstance(found, RowIds) else None
            self._unmatched = found if isinstance(found, Unmatched) else None
            self._data.received(None if batch is None else origin.dataset)
            self.session.batch(None if self._data.unclear else ids, batch=batch)
            if ids is not None:
                self.note(ids, origin)

    def note(self, sample_ids: Tensor, origin: Origin) -> None:
        """Where samples with ids of their own lie in the dataset, for the quarantine."""
        if origin.rows is not None and self.alerts.quarantine and not self.identity.by_index(origin.dataset):
            self._data.note(origin.dataset, sample_ids, origin.rows)

    def _on_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._data.used()
        if self._data.unclear and not self.closed and torch.is_grad_enabled() and not self.session.expects():
            self.session.warn_once(
                "batches of two loaders came before the model was called, and it is not known whose samples "
                "it sees: such steps are not captured. Name them with hook.step(sample_ids=...)"
            )
        elif self._unmatched is not None and not self.closed and torch.is_grad_enabled():
            self._tell(self._unmatched)
        super()._on_forward(model, args, kwargs)

    def _tell(self, unmatched: Unmatched) -> None:
        if not self.session.expects():  # else hook.step has named them
            self.session.warn_once("such steps are not captured: %s", unmatched.reason)

    def _backward(self, original: Callable[..., Any], loss: Tensor, *args: Any, **kwargs: Any) -> None:
        scale = scale_of(self.accelerator.scaler)
        original(loss, *args, **kwargs)
        with self.guarded():
            self._data.trained()
            known = self.session.in_pass
            divided = self.loss_divided_by()
            accumulation = 1 / (divided * self.accelerator.gradient_accumulation_steps)
            self.session.backward(float(loss.detach()) * divided if known else None, scale, accumulation)

    def loss_divided_by(self) -> float:
        """By how much the loop has divided the loss before it calls ``accelerator.backward``."""
        return 1.0

    def _log(self, original: Callable[..., Any], values: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Our numbers travel with the loop's own, at its step: trackers drop steps that go back."""
        ours: dict[str, float] = {}
        recorder = self.session.recorder
        with self.guarded():
            if recorder is not None:
                ours = self.session.scalars.take(recorder.alerts)
        original({**values, **ours}, *args, **kwargs)

    def _end_training(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.close()
        return original(*args, **kwargs)

    def why_nothing(self) -> str:
        if not len(self._models):
            return "no model with trainable parameters went through accelerator.prepare() after DiffHook"
        if self._loader is None:
            return (
                "no DataLoader over an indexed dataset went through accelerator.prepare(): name the "
                "samples with hook.step(sample_ids=..., timesteps=...)"
            )
        if isinstance(self.settings.sample_ids, str):
            return f"no batch had the key {self.settings.sample_ids!r} (sample_ids)"
        return super().why_nothing()
