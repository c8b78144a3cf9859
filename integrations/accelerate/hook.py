"""DiffHook: two lines in an Accelerate training loop."""

from __future__ import annotations

import functools
import json
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.utils.data import DataLoader

from diffhook.capture import Detector, Objective, Plan, Probe, Recorder
from diffhook.capture.alerts import default_detectors
from diffhook.errors import CaptureError, ConfigurationError, LogError
from diffhook.gradients import LocalHook, PerSampleGradients
from diffhook.integrations.accelerate import identity
from diffhook.integrations.accelerate.describe import describe_run
from diffhook.integrations.accelerate.summary import plan_text, summary
from diffhook.integrations.accelerate.watch import SampleLosses, find_timesteps, prediction
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
        alerts: detectors; None for the default ones, () for none.
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
        alerts: Sequence[Detector] | None = None,
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
        self.step_count = 0  #: optimiser steps taken
        self._lr_sum = 0.0  # of the steps since the last snapshot, when resuming
        self._projection_dim: int | Literal["full"] = projection_dim
        self._seed = seed
        self._snapshot_every = snapshot_every
        self._objective = objective
        self._probe = probe or (Probe() if objective is not None else None)
        self._detectors = default_detectors() if alerts is None else list(alerts)
        self._model: nn.Module | None = None
        self._loader: DataLoader[Any] | None = None
        self._recorder: Recorder | None = None
        self._undo: list[Callable[[], None]] = []
        self._sample_ids: Tensor | None = None
        self._timesteps: Tensor | None = None
        self._losses: SampleLosses | None = None
        self._in_pass = False
        self._synced = False  # an optimiser step is due for the rows captured last
        self._step_seconds = 0.0  # capture time within the current optimiser step
        self._step_rows = 0
        self._step_captured = False
        self._step_began: float | None = None
        self._began = time.perf_counter()
        self._closed = not enabled
        if enabled:
            self._attach()

    # ── the public face ───────────────────────────────────────────────────────────────────────

    @contextmanager
    def step(self, *, sample_ids: Any, timesteps: Any = None, loss_scale: float = 1.0) -> Iterator[None]:
        """Name the samples of one micro-batch, around its forward and backward.

        Args:
            sample_ids: (B,) integers.
            timesteps: (B,) numbers; None to read them from the model's arguments.
            loss_scale: factor on the loss besides the mean over the batch, for a loop that calls
                ``loss.backward()`` itself.
        """
        with self._guarded():
            self._sample_ids = torch.as_tensor(sample_ids).detach().flatten().long()
            self._timesteps = None if timesteps is None else torch.as_tensor(timesteps).detach()
        yield
        with self._guarded():
            self._end_pass(None, loss_scale, 1.0)

    def close(self) -> None:
        """Write what is left, take a last snapshot, and leave model and accelerator as they were.

        Idempotent; also called by ``accelerator.end_training()`` and at interpreter exit.
        """
        if self._closed:
            return
        recorder = self._recorder
        with self._guarded():
            if recorder is not None:
                if self.step_count:
                    recorder.snapshot(self.step_count)
                numbers, text = summary(self.plan, recorder, time.perf_counter() - self._began)
                if recorder.rank == 0:
                    recorder.writer.record("summary.json", numbers)
                recorder.close()
                if recorder.rank == 0:
                    print(text, flush=True)
        self._detach()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ── attaching ─────────────────────────────────────────────────────────────────────────────

    def _attach(self) -> None:
        accelerator = self.accelerator
        for name, wrapper in (
            ("prepare", self._prepare),
            ("backward", self._backward),
            ("end_training", self._end_training),
        ):
            original = getattr(accelerator, name)
            setattr(accelerator, name, functools.partial(wrapper, original))
            self._undo.append(functools.partial(accelerator.__dict__.pop, name, None))
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

    def _detach(self) -> None:
        self._closed = True
        if self._recorder is not None:
            self._recorder.engine.abandon()
            self._recorder.engine.detach()
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        self._recorder = None

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
            bad_use = isinstance(error, ConfigurationError | LogError) and self._recorder is None
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
        with self._guarded():
            for argument in args:
                if isinstance(argument, DataLoader) and identity.can_tag(argument):
                    self._loader = self._loader or argument
            args = tuple(self._tagged(argument) for argument in args)
        prepared = original(*args, **kwargs)
        with self._guarded():
            results = prepared if isinstance(prepared, tuple) else (prepared,)
            for argument, result in zip(args, results, strict=True):
                self._discover(argument, result)
        return prepared

    def _tagged(self, argument: Any) -> Any:
        if not self._closed and isinstance(argument, DataLoader) and identity.can_tag(argument):
            return identity.tag(argument)
        return argument

    def _discover(self, argument: Any, result: Any) -> None:
        if isinstance(argument, nn.Module) and any(p.requires_grad for p in argument.parameters()):
            if self._model is not None:
                raise ConfigurationError(
                    "two trained models were prepared; diffhook watches one: "
                    f"{type(self._model).__name__} and {type(argument).__name__}"
                )
            kind = self.accelerator.distributed_type
            if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
                raise ConfigurationError(f"{kind.value} shards parameters: not supported yet")
            self._model = model = self.accelerator.unwrap_model(result)
            handles = [
                model.register_forward_pre_hook(LocalHook(model, self._on_forward), with_kwargs=True),
                model.register_forward_hook(LocalHook(model, self._on_output)),
            ]
            self._undo += [handle.remove for handle in handles]
        if isinstance(argument, DataLoader):
            self._undo.append(functools.partial(identity.untag, result))
        if isinstance(argument, torch.optim.Optimizer):
            handle = argument.register_step_post_hook(self._on_step)
            self._undo.append(handle.remove)

    # ── events of the loop ────────────────────────────────────────────────────────────────────

    def _on_batch(self, sample_ids: Tensor) -> None:
        self._sample_ids = sample_ids

    def _on_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._closed or self._in_pass or not torch.is_grad_enabled():
            return
        if self._sample_ids is None:
            return
        with self._guarded():
            if self._recorder is None:
                self._start(model)
            if self._step_began is None:
                self._step_began = time.perf_counter()
            if not self.plan.captures(self.step_count):
                return
            timesteps = find_timesteps(args, kwargs) if self._timesteps is None else self._timesteps
            if timesteps is None:
                raise CaptureError(
                    f"{type(model).__name__} was called without a timestep (keyword 'timestep' or "
                    "second argument): name it with hook.step(sample_ids=..., timesteps=...)"
                )
            if len(timesteps) != len(self._sample_ids):
                raise CaptureError(
                    f"the batch has {len(self._sample_ids)} sample ids but {len(timesteps)} "
                    "timesteps: name both with hook.step(sample_ids=..., timesteps=...)"
                )
            assert self._recorder is not None
            if self._synced and self.accelerator.optimizer_step_was_skipped:
                self._recorder.skipped()
            self._synced = False
            self._timesteps = timesteps
            self._in_pass = True
            self._recorder.engine.begin()
            self._recorder.engine.enter_model(model, args, kwargs)

    def _on_output(self, model: nn.Module, args: Any, output: Any) -> None:
        if self._in_pass and self._losses is None and torch.is_grad_enabled():
            with self._guarded():
                predicted = prediction(output)
                if predicted is not None and predicted.requires_grad:
                    self._losses = SampleLosses(predicted)

    def _backward(self, original: Callable[..., Any], loss: Tensor, *args: Any, **kwargs: Any) -> None:
        accumulation = 1.0 / self.accelerator.gradient_accumulation_steps
        scaler = getattr(self.accelerator, "scaler", None)
        scale = float(scaler.get_scale()) if scaler is not None else 1.0
        original(loss, *args, **kwargs)
        with self._guarded():
            self._end_pass(float(loss.detach()) if self._in_pass else None, scale, accumulation)

    def _end_pass(self, batch_loss: float | None, scale: float, accumulation: float) -> None:
        """The backward of a micro-batch is over: stage its rows."""
        recorder, ids, timesteps = self._recorder, self._sample_ids, self._timesteps
        self._sample_ids = self._timesteps = None
        if not self._in_pass or recorder is None or ids is None or timesteps is None:
            self._losses = None
            return
        began = time.perf_counter()
        self._in_pass = False
        engine = recorder.engine
        engine.loss_scale = scale * accumulation
        engine.finish()
        losses = None
        if self._losses is not None and batch_loss is not None:
            losses = self._losses.losses(len(ids) / engine.loss_scale, batch_loss)
        self._losses = None
        share = accumulation / (len(ids) * self.accelerator.num_processes)
        recorder.captured(
            ids, timesteps, step=self.step_count, weight=share * self.plan.stride, losses=losses
        )
        self._synced = self.accelerator.sync_gradients
        self._step_rows += len(ids)
        self._step_captured = True
        self._step_seconds += time.perf_counter() - began + engine.hook_seconds

    def _on_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        """The optimiser has just moved the parameters; the scheduler has not moved the rate."""
        recorder = self._recorder
        if recorder is None or self._closed:
            return
        with self._guarded():
            group = optimizer.param_groups[0]
            began = time.perf_counter()
            batch = self._step_rows * self.accelerator.num_processes
            recorder.stepped(float(group["lr"]) * float(group.get("d", 1.0)), batch)
            self.step_count += 1
            now = time.perf_counter()
            self._account(now - began, now)
            if self._snapshot_every and self.step_count % self._snapshot_every == 0:
                recorder.snapshot(self.step_count)
                self._step_began = time.perf_counter()

    def _account(self, releasing: float, now: float) -> None:
        captured = self._step_seconds + releasing if self._step_captured else None
        if self._step_began is not None:
            chosen = self.plan.finished_step(captured, now - self._step_began)
            if chosen and self.accelerator.is_main_process:
                print(
                    f"diffhook: capturing one step in {self.plan.stride} to stay within "
                    f"{self.plan.overhead:.0%} overhead",
                    flush=True,
                )
        self._step_began = now
        self._step_seconds, self._step_rows, self._step_captured = 0.0, 0, False

    def _on_save(self, models: list[nn.Module], weights: list[Any], output_dir: str) -> None:
        recorder = self._recorder
        if recorder is None:
            return
        with self._guarded():
            recorder.snapshot(self.step_count)
            if self.accelerator.is_main_process:
                state = {"step": self.step_count, "lr_sum": recorder.lr_sum}
                Path(output_dir, _STATE).write_text(json.dumps(state))

    def _on_load(self, models: list[nn.Module], input_dir: str) -> None:
        path = Path(input_dir, _STATE)
        with self._guarded():
            if not path.exists():
                return  # a checkpoint written without us: its steps count from here
            if self._recorder is not None:
                self._recorder.close()
                self._recorder = None
            state = json.loads(path.read_text())
            self.step_count, self._lr_sum = int(state["step"]), float(state["lr_sum"])

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
        self._recorder = Recorder(
            engine,
            self.path,
            describe_run(engine, self._objective),
            rank=self.accelerator.process_index,
            start_step=self.step_count,
            lr_sum=self._lr_sum,
            detectors=self._detectors,
            objective=self._objective,
            probe=probe,
        )
        self._began = time.perf_counter()
        if self.accelerator.is_main_process:
            batch = 0 if self._sample_ids is None else len(self._sample_ids)
            print(
                plan_text(
                    self.plan,
                    self._recorder,
                    batch * self.accelerator.num_processes,
                    None if self._loader is None else len(self._loader),
                    self._snapshot_every,
                ),
                flush=True,
            )
