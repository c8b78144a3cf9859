"""DiffHook: two lines in an Accelerate training loop."""

from __future__ import annotations

import functools
import json
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.utils.data import DataLoader

from diffhook.capture import Alerts, Detector, Objective, Plan, Probe, Quarantine, Recorder
from diffhook.errors import ConfigurationError, LogError
from diffhook.gradients import LocalHook, PerSampleGradients
from diffhook.integrations.accelerate import identity, quarantine
from diffhook.integrations.accelerate.describe import describe_run
from diffhook.integrations.accelerate.session import Session
from diffhook.integrations.accelerate.summary import plan_text, summary
from diffhook.integrations.notify import Trackers
from diffhook.log.store import Location

logger = logging.getLogger("diffhook")

_STATE = "diffhook.json"  # in a checkpoint's folder; scripts parse names that begin "checkpoint"


class DiffHook:
    """Watches an Accelerate training loop and logs per-sample gradients.

    Example:
        >>> accelerator = Accelerator()
        >>> hook = DiffHook(accelerator, "runs/butterflies")  # before accelerator.prepare()

    The loop stays as it is. The hook learns of the model, optimiser and data from ``prepare``, of
    timesteps from the model's arguments, of the backward from ``accelerator.backward``. Training
    results are bit-identical with and without it. An error of ours is logged once and ends the
    capture, not the training.

    Args:
        accelerator: the loop's.
        path: the log: a folder, an fsspec URL, or a zarr Store.
        projection_dim: D; 0 for norms only; "full" keeps whole gradients.
        seed: seed of the projection.
        every: capture one optimiser step in this many.
        overhead: instead, the share of the training time that capture may add, such as 0.05.
        snapshot_every: optimiser steps between snapshots, besides those at every ``save_state``
            and at the end.
        probe: which samples to probe at snapshots, given an ``objective``.
        objective: the training loss, for probes.
        alerts: an :class:`~diffhook.capture.Alerts`, or detectors; None for the usual, () for none.
        strict: raise our own errors instead of logging them.
        enabled: False makes the hook do nothing at all.
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
        probe: Probe | None = None,
        objective: Objective | None = None,
        alerts: Alerts | Sequence[Detector] | None = None,
        strict: bool = False,
        enabled: bool = True,
    ) -> None:
        if projection_dim != "full" and projection_dim < 0:
            raise ConfigurationError(f'projection_dim is {projection_dim}; expected an integer ≥ 0 or "full"')
        if snapshot_every is not None and snapshot_every < 1:
            raise ConfigurationError(f"snapshot_every is {snapshot_every}; expected at least 1")
        if probe is not None and objective is None:
            raise ConfigurationError("probes need an objective, such as DiffusionObjective(...)")
        self.accelerator = accelerator
        self.path = path
        self.plan = Plan(every, overhead)
        self.strict = strict
        self._projection_dim: int | Literal["full"] = projection_dim
        self._seed = seed
        self._snapshot_every = snapshot_every
        self._objective = objective
        self._probe = probe or (Probe() if objective is not None else None)
        self._alerts = Alerts.of(alerts, Trackers(accelerator))
        self._session = Session(accelerator, self.plan, snapshot_every)
        self._lr_sum = 0.0  # of the steps since the last snapshot, when resuming
        self._model: nn.Module | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._loader: DataLoader[Any] | None = None
        self._undo: list[Callable[[], None]] = []
        self._process = os.getpid()
        self._started = False
        self._closed = not enabled
        if enabled:
            self._attach()

    # ── the public face ───────────────────────────────────────────────────────────────────────

    @property
    def step_count(self) -> int:
        """Optimiser steps taken."""
        return self._session.step_count

    @property
    def quarantine(self) -> Quarantine:
        """The samples that are left out, to add to and remove from by hand.

        Raises:
            ConfigurationError: quarantine is off.
        """
        return quarantine.of(self._alerts)

    @contextmanager
    def step(self, *, sample_ids: Any, timesteps: Any = None, loss_scale: float = 1.0) -> Iterator[None]:
        """Name the samples of one micro-batch, around its forward and backward.

        Args:
            sample_ids: (B,) integers ≥ 0.
            timesteps: (B,) numbers; None to read them from the model's arguments.
            loss_scale: for a loop that calls ``loss.backward()`` itself: factor on the loss besides
                the mean over the batch, such as 1/k when it accumulates k micro-batches.

        Raises:
            ConfigurationError: a negative id.
        """
        ids = torch.as_tensor(sample_ids).detach().flatten().long()
        if bool((ids < 0).any()):
            raise ConfigurationError(f"sample id {int(ids.min())} is negative; expected 0 or more")
        with self._guarded():
            named = None if timesteps is None else torch.as_tensor(timesteps).detach().flatten()
            self._session.batch(ids, named)
        try:
            yield
        except BaseException:
            self._session.abandon()
            raise
        with self._guarded():
            if self._session.in_pass:
                self._session.backward(None, 1.0, loss_scale)
            self._session.batch(None)

    def close(self) -> None:
        """Write what is left, take a last snapshot, and leave model and accelerator as they were.

        Idempotent; also called by ``accelerator.end_training()`` and at interpreter exit.
        """
        if self._closed or os.getpid() != self._process:  # a DataLoader worker is not the run
            return
        session, recorder = self._session, self._session.recorder
        try:
            with self._guarded():
                if recorder is not None:
                    if session.step_count:
                        session.snapshot()
                    numbers, text = summary(self.plan, recorder, time.perf_counter() - session.began)
                    if recorder.rank == 0:
                        recorder.writer.record("summary.json", numbers)
                    recorder.close()
                    if recorder.rank == 0:
                        print(text, flush=True)
                elif not self._started:
                    logger.warning("diffhook captured nothing: %s", self._why_nothing())
        finally:
            self._detach()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _why_nothing(self) -> str:
        if self._model is None:
            return "no model with trainable parameters went through accelerator.prepare() after DiffHook"
        if self._loader is None:
            return (
                "no DataLoader over an indexed dataset went through accelerator.prepare(): name the "
                "samples with hook.step(sample_ids=..., timesteps=...)"
            )
        return "the model was never called on a training batch"

    # ── attaching ─────────────────────────────────────────────────────────────────────────────

    def _attach(self) -> None:
        accelerator = self.accelerator
        for name, wrapper in (
            ("prepare", self._prepare),
            ("backward", self._backward),
            ("end_training", self._end_training),
        ):
            self._replace(accelerator, name, functools.partial(wrapper, getattr(accelerator, name)))
        saving = accelerator.register_save_state_pre_hook(self._on_save)
        loading = accelerator.register_load_state_pre_hook(self._on_load)
        self._undo += [saving.remove, loading.remove]
        identity.listen(self._on_batch)
        self._undo.append(functools.partial(identity.unlisten, self._on_batch))
        reference = weakref.ref(self)

        def at_exit() -> None:
            hook = reference()
            if hook is not None:
                hook.close()

        # Not atexit: by then the thread pools that zarr writes through are gone.
        threading._register_atexit(at_exit)  # type: ignore[attr-defined]

    def _replace(self, owner: Any, name: str, function: Callable[..., Any]) -> None:
        """Put ``function`` over a method of one object, until we detach."""
        owner.__dict__[name] = function
        self._undo.append(functools.partial(owner.__dict__.pop, name, None))

    def _detach(self) -> None:
        """Leave everything as it was; rows captured so far are kept."""
        self._closed = True
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        recorder, self._session.recorder = self._session.recorder, None
        if recorder is not None:
            try:
                recorder.close()
            except Exception as error:  # the error that brought us here has been told
                logger.debug("closing the log: %s", error)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """We are a guest: an error of ours ends the capture, not the training."""
        if self._closed:
            yield
            return
        try:
            yield
        except Exception as error:
            # Bad use is told before the first step, while nothing is lost by stopping there.
            bad_use = isinstance(error, ConfigurationError | LogError) and not self._started
            if self.strict or bad_use:
                raise
            logger.error(
                "diffhook has stopped capturing; training goes on. %s: %s",
                type(error).__name__,
                error,
                exc_info=error,
            )
            self._detach()

    def _prepare(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        tagged = tuple(self._tagged(argument) for argument in args)
        prepared = original(*tagged, **kwargs)
        results = prepared if isinstance(prepared, tuple) else (prepared,)
        for argument, given, result in zip(args, tagged, results, strict=True):
            if argument is not given:
                self._undo.append(functools.partial(identity.untag, result))
                self._undo.append(quarantine.leave_out(result, self._alerts))
        with self._guarded():
            for argument, result in zip(args, results, strict=True):
                self._discover(argument, result)
        return prepared

    def _tagged(self, argument: Any) -> Any:
        if not isinstance(argument, DataLoader) or not identity.can_tag(argument):
            return argument
        self._loader = self._loader or argument
        return identity.tag(argument)

    def _discover(self, argument: Any, result: Any) -> None:
        if isinstance(argument, nn.Module) and any(p.requires_grad for p in argument.parameters()):
            self._watch_model(self.accelerator.unwrap_model(result))
        if isinstance(result, AcceleratedOptimizer):
            self._watch_optimizer(result)

    def _watch_model(self, model: nn.Module) -> None:
        if model is self._model:
            return
        if self._model is not None:
            raise ConfigurationError(
                "two trained models were prepared; diffhook watches one: "
                f"{type(self._model).__name__} and {type(model).__name__}"
            )
        kind = self.accelerator.distributed_type
        if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise ConfigurationError(f"{kind.value} shards parameters: not supported yet")
        self._model = model
        handles = [
            model.register_forward_pre_hook(LocalHook(model, self._on_forward), with_kwargs=True),
            model.register_forward_hook(LocalHook(model, self._on_output)),
        ]
        self._undo += [handle.remove for handle in handles]

    def _watch_optimizer(self, wrapped: AcceleratedOptimizer) -> None:
        if self._optimizer is not None:  # a step is counted once, by the first optimiser
            return
        self._optimizer = wrapped.optimizer
        handle = self._optimizer.register_step_post_hook(self._on_step)
        self._undo.append(handle.remove)
        self._replace(wrapped, "zero_grad", functools.partial(self._zero_grad, wrapped.zero_grad))

    # ── events of the loop ────────────────────────────────────────────────────────────────────

    def _on_batch(self, sample_ids: Tensor | None) -> None:
        with self._guarded():
            self._session.batch(sample_ids)

    def _on_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._closed or not self._session.expects():
            return
        with self._guarded():
            if self._session.recorder is None:
                self._start(model)
            self._session.forward(model, args, kwargs)

    def _on_output(self, model: nn.Module, args: Any, output: Any) -> None:
        if self._session.in_pass and torch.is_grad_enabled():
            with self._guarded():
                self._session.output(output)

    def _backward(self, original: Callable[..., Any], loss: Tensor, *args: Any, **kwargs: Any) -> None:
        accumulation = 1.0 / self.accelerator.gradient_accumulation_steps
        scaler = getattr(self.accelerator, "scaler", None)
        scale = float(scaler.get_scale()) if scaler is not None else 1.0
        original(loss, *args, **kwargs)
        with self._guarded():
            known = self._session.in_pass
            self._session.backward(float(loss.detach()) if known else None, scale, accumulation)

    def _zero_grad(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        with self._guarded():
            self._session.skipped()

    def _on_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        with self._guarded():
            self._session.stepped(optimizer)

    def _on_save(self, models: list[nn.Module], weights: list[Any], output_dir: str) -> None:
        recorder = self._session.recorder
        if recorder is None:
            return
        with self._guarded():
            self._session.snapshot()
            if self.accelerator.is_main_process:
                state = {"step": self.step_count, "lr_sum": recorder.lr_sum}
                Path(output_dir, _STATE).write_text(json.dumps(state))

    def _on_load(self, models: list[nn.Module], input_dir: str) -> None:
        path = Path(input_dir, _STATE)
        with self._guarded():
            if not path.exists():
                return  # a checkpoint written without us: its steps count from here
            if self._session.recorder is not None:
                self._session.recorder.close()
                self._session.recorder = None
            state = json.loads(path.read_text())
            self._session.step_count = int(state["step"])
            self._lr_sum = float(state["lr_sum"])

    def _end_training(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.close()
        return original(*args, **kwargs)

    # ── starting ──────────────────────────────────────────────────────────────────────────────

    def _start(self, model: nn.Module) -> None:
        """At the first training forward: adapters, freezing and resuming are settled by then."""
        engine = PerSampleGradients(model, projection_dim=self._projection_dim, seed=self._seed)
        probe = self._probe
        if probe is not None and probe.dataset is None:
            if self._loader is None:
                raise ConfigurationError(
                    "the probe has no dataset, and no DataLoader over one was prepared: pass "
                    "probe=Probe(dataset=...)"
                )
            probe = Probe(
                probe.samples,
                probe.grid,
                probe.batch_size,
                self._loader.dataset,
                probe.collate or self._loader.collate_fn,
            )
        recorder = Recorder(
            engine,
            self.path,
            describe_run(engine, self._objective),
            rank=self.accelerator.process_index,
            start_step=self.step_count,
            lr_sum=self._lr_sum,
            alerts=self._alerts,
            objective=self._objective,
            probe=probe,
        )
        self._session.recorder, self._started = recorder, True
        self._session.began = time.perf_counter()
        if self.accelerator.is_main_process:
            ids = self._session.sample_ids
            batch = (0 if ids is None else len(ids)) * self.accelerator.num_processes
            batches = None if self._loader is None else len(self._loader)
            print(plan_text(self.plan, recorder, batch, batches, self._snapshot_every), flush=True)
