"""What an Accelerator does, as events of the loop."""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import nn

from diffhook.capture.alerts import Alerts
from diffhook.capture.loop import Capture, events
from diffhook.capture.loop.identity import RowIds
from diffhook.capture.loop.identity.batch_ids import shown_by
from diffhook.capture.loop.identity.loader_tracker import LoaderTracker
from diffhook.capture.loop.run.checkpoint import read_state, write_state
from diffhook.capture.loop.watches.model_watch import adapters_of, is_trained
from diffhook.capture.loop.watches.optimizers import scale_of
from diffhook.capture.settings import Settings
from diffhook.compat.accelerate import prepared
from diffhook.errors import ConfigurationError
from diffhook.gradients.sharding import SPLIT, refusal
from diffhook.integrations.accelerate import loaders, quarantine
from diffhook.integrations.notify import Trackers
from diffhook.integrations.torch import fetches
from diffhook.log.store import Location
from diffhook.words import brief

_REFUSED = {DistributedType.MEGATRON_LM: SPLIT}


def capture_on(accelerator: Accelerator, path: Location, settings: Settings) -> Capture:
    """A capture of this process's share of an Accelerator's loop, whose alerts its trackers get.

    Raises:
        ConfigurationError: no accelerator, or parameters are sharded in a way that is not supported.
    """
    if not hasattr(accelerator, "distributed_type"):
        hint = " Are the two swapped?" if isinstance(path, Accelerator) else ""
        raise ConfigurationError(
            f"the accelerator is {brief(accelerator)}; expected DiffHook(accelerator, path), or "
            f"TorchHook(path, model, optimizer) in a loop without Accelerate.{hint}"
        )
    kind = accelerator.distributed_type
    if settings.enabled and kind in _REFUSED:
        raise refusal(_REFUSED[kind])
    return Capture(
        path,
        settings,
        rank=accelerator.process_index,
        processes=accelerator.num_processes,
        alerts=Alerts.of(settings.alerts, Trackers(weakref.proxy(accelerator))),  # their threads outlast it
    )


class AcceleratorEvents:
    """Learns of models, optimisers and data from ``prepare``, of batches from prepared loaders, of the loss's
    scales from ``backward``, of checkpoints from the state hooks, and of the end from ``end_training``.

    Args:
        accelerator: the loop's.
        capture: gets the events.
        keeper: what the accelerator is to keep alive, so that the loop need not.
        deliver: called with (batch, event) in place of ``capture.on(event)`` where batches are not used as
            they come; a bound method, held weakly.
        loss_divided_by: by how much the loop has divided its loss before ``accelerator.backward``.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        capture: Capture,
        *,
        keeper: object,
        deliver: Callable[[Any, events.Event], None] | None = None,
        loss_divided_by: Callable[[], float] = lambda: 1.0,
    ) -> None:
        self._accelerator = weakref.proxy(accelerator)
        self._capture = capture
        self._deliver = None if deliver is None else weakref.WeakMethod(deliver)
        self._loss_divided_by = loss_divided_by
        self._data = LoaderTracker()
        self._frozen: list[nn.Module] = []  # prepared before the optimiser
        self._prepares = False  # the loop trains on batches of prepared loaders
        if not capture.closed:
            self._attach(accelerator, keeper)

    def _attach(self, accelerator: Accelerator, keeper: object) -> None:
        attachment, shield = self._capture.attachment, self._capture.shield
        attachment.own(accelerator)
        accelerator.__dict__["_diffhook"] = keeper
        attachment.on_detach(functools.partial(accelerator.__dict__.pop, "_diffhook", None))
        attachment.replace(accelerator, "prepare", before=self._before_prepare, after=self._after_prepare)
        attachment.replace(accelerator, "backward", before=self._before_backward)
        attachment.replace(accelerator, "log", before=self._before_log)
        attachment.replace(accelerator, "end_training", before=self._end, after=self._end)
        attachment.hook(self._before_save, accelerator.register_save_state_pre_hook)
        attachment.hook(self._before_load, accelerator.register_load_state_pre_hook)
        attachment.hook(self._on_prepared, loaders.listen)
        attachment.hook(self._on_fetched, fetches.listen)
        self._capture.reasons_for_nothing = self.why_nothing
        shield(self._adopt)

    def _adopt(self) -> None:
        """Watch what was prepared before us."""
        found = prepared(self._accelerator)
        for model in found.models:
            if is_trained(model):
                self._capture.watch(model)
        for optimizer in found.optimizers:
            self._capture.watch(optimizer.optimizer)
        for loader in found.loaders:
            plain = loaders.tag_prepared(loader)
            if plain is not None:
                self._add_loader(plain, loader)

    def _before_save(self, models: Any, weights: Any, folder: str) -> None:
        self.save(folder)

    def _before_load(self, models: Any, folder: str) -> None:
        self.load(folder)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """A checkpoint is being written to ``folder``."""
        state = self._capture.state()
        if self._accelerator.is_main_process and not self._capture.closed:
            self._capture.shield(write_state, folder, state)

    def load(self, folder: str | os.PathLike[str]) -> None:
        """Training goes on from a checkpoint."""
        self._capture.resume(self._capture.shield(read_state, folder) or {})

    # ── models, optimisers, data ──────────────────────────────────────────────────────────────

    def _before_prepare(self, *args: Any, **kwargs: Any) -> Any:
        return tuple(self._tagged(a) if loaders.can_tag(a) else a for a in args), kwargs

    def _tagged(self, loader: Any) -> Any:
        tagged = loaders.tag(loader)
        self._capture.attachment.on_detach(functools.partial(loaders.untag, tagged))
        return tagged

    def _after_prepare(self, prepared: Any, *args: Any, **kwargs: Any) -> None:
        results = prepared if len(args) > 1 else (prepared,)
        for argument, result in zip(args, results, strict=True):
            if loaders.can_tag(argument):
                self._add_loader(argument, result)
            elif isinstance(result, nn.Module) and is_trained(result):
                self._capture.watch(result)
            elif isinstance(result, nn.Module):
                self._frozen.append(result)
            elif isinstance(result, AcceleratedOptimizer):
                self._watch_adapters(result.optimizer)
                self._capture.watch(result.optimizer)

    def _watch_adapters(self, optimizer: torch.optim.Optimizer) -> None:
        """Some trainers prepare the frozen model alone, and an optimiser of the adapters within."""
        if not self._capture.models.moved_by(optimizer):
            for host in self._frozen:
                self._capture.watch(adapters_of(host))
        self._frozen.clear()

    def _add_loader(self, loader: Any, prepared: Any) -> None:
        capture = self._capture
        if capture.identity.datasets.add(loader.dataset, shuffled=loaders.is_shuffled(loader)):
            capture.loader, self._data.first = loader, loader.dataset
        capture.attachment.on_detach(functools.partial(loaders.untag, prepared))
        capture.attachment.on_detach(
            quarantine.leave_out(prepared, capture.alerts, self._data, capture.identity, capture.shield)
        )

    # ── batches ───────────────────────────────────────────────────────────────────────────────

    def _on_prepared(self, batch: Any, arrival: loaders.Arrival) -> None:
        # One that ends, perhaps another training's as garbage, says nothing of this one, …
        self._prepares = self._prepares or batch is not None
        if self._capture.session.thread.is_here:  # … least of all in the thread that collects it.
            self._on_batch(batch, arrival)
        elif batch is not None:
            self._elsewhere(arrival.unknown.dataset)

    def _on_fetched(self, batch: Any, dataset: Any, here: bool) -> None:
        """Of a loader that was not prepared: some trainers use such loaders only."""
        if not here:
            self._elsewhere(dataset)
        elif not self._prepares:
            self._on_batch(batch, loaders.Arrival.untagged(dataset))

    def _elsewhere(self, dataset: Any) -> None:
        if self._capture.identity.datasets.knows(dataset):
            self._capture.session.fetched_elsewhere()

    def _on_batch(self, batch: Any, arrival: loaders.Arrival) -> None:
        source, session = arrival.unknown.source, self._capture.session
        if batch is None:
            self._send(None, events.LoaderEnded(source))
            return
        needed = session.staging.needs_rows or session.steps.captured_next or self._capture.alerts.quarantine
        if arrival.waits and not needed:
            self._data.received(arrival.unknown.dataset)
            self._send(batch, events.BatchReceived(None, batch, source=source))
            return
        origin, waits = arrival.origin(), session.staging.needs_rows
        found = self._capture.identity.of(batch, origin, waits=waits)
        self._data.received(origin.dataset)
        self._send(batch, events.BatchReceived(found, shown_by(batch), source=origin.source))
        named = self._capture.alerts.quarantine and not self._capture.identity.by_index(origin.dataset)
        if named and isinstance(found, RowIds) and origin.rows is not None:
            self._data.note(origin.dataset, found.ids, origin.rows)

    def _send(self, batch: Any, event: events.Event) -> None:
        deliver = None if self._deliver is None else self._deliver()
        if deliver is None:
            self._capture.on(event)
        else:
            deliver(batch, event)

    # ── backward, trackers, end ───────────────────────────────────────────────────────────────

    def _before_backward(self, *_: Any, **__: Any) -> None:
        self._data.trained()
        if not self._capture.session.in_pass:  # to ask a scaler is to wait for its device
            return
        divided = self._loss_divided_by() * self._accelerator.gradient_accumulation_steps
        self._capture.on(events.LossScaled(scale_of(self._accelerator.scaler), 1 / divided))

    def _before_log(self, values: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Our numbers travel with the loop's own, at its step: trackers drop steps that go back."""
        return ({**values, **self._capture.scalars()}, *args), kwargs

    def _end(self, *_: Any, **__: Any) -> None:
        self._capture.close()

    def why_nothing(self) -> str | None:
        """Why nothing was captured, as far as the accelerator tells."""
        if not len(self._capture.models):
            return "no model with trainable parameters went through accelerator.prepare() after DiffHook"
        if self._capture.loader is None:
            return (
                "no DataLoader over an indexed dataset went through accelerator.prepare(): name the "
                "samples with hook.step(sample_ids=..., timesteps=...)"
            )
        if isinstance(self._capture.settings.sample_ids, str):
            return f"no batch had the key {self._capture.settings.sample_ids!r} (sample_ids)"
        return None
