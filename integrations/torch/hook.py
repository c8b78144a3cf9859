"""TorchHook: capture in a loop that says itself what it does."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.utils.data import IterableDataset

from diffhook.capture import Alerts, Recorder
from diffhook.capture.loop import checkpoint
from diffhook.capture.loop.attachment import Attachment, Weak
from diffhook.capture.loop.call_inspection import overflowed, scale_of
from diffhook.capture.loop.describe import describe_run
from diffhook.capture.loop.frozen_denoiser import FrozenDenoiser
from diffhook.capture.loop.identity import Identity
from diffhook.capture.loop.models import Models, refuse_compiled, refuse_sharded
from diffhook.capture.loop.probing import training_probe
from diffhook.capture.loop.ranks import Ranks
from diffhook.capture.loop.session import Session
from diffhook.capture.loop.summary import plan_text, summary
from diffhook.capture.preconditioner import adam_preconditioner
from diffhook.capture.settings import Settings
from diffhook.errors import LogError
from diffhook.gradients import PerSampleGradients
from diffhook.log.store import Location, settled

logger = logging.getLogger("diffhook")


class TorchHook(Attachment):
    """Watches a training loop in plain PyTorch and logs per-sample gradients.

    Example:
        >>> hook = TorchHook("runs/butterflies", model, optimizer)
        >>> for batch in loader:
        ...     with hook.step(sample_ids=batch["id"]):  # around forward and backward
        ...         loss(model, batch).backward()
        ...     optimizer.step()
        >>> hook.close()

    It leaves nothing on model and optimiser after :meth:`close`, a ``with`` block, when it is
    garbage, and when another hook comes to the same model: so a notebook's cell can be run again
    after an error, and the rows of the run that died are kept. A loop that was interrupted may go on.

    Args:
        path: the log: a folder, an fsspec URL, or a zarr Store.
        model: the trained model, or several that one backward reaches; unwrapped, not DDP's.
        optimizer: whose steps count; of several, the first. Rows have its first group's learning rate.
        scaler: the ``GradScaler`` by which the loop scales its losses, if it does.
        rank, processes: this process's number, and how many share the batch.
        settings: see :class:`~diffhook.capture.settings.Settings`.
    """

    def __init__(
        self,
        path: Location,
        *model_and_optimizer: nn.Module | torch.optim.Optimizer | GradScaler,
        rank: int = 0,
        processes: int = 1,
        **settings: Any,
    ) -> None:
        self.settings = Settings(**settings)
        super().__init__(strict=self.settings.strict, enabled=self.settings.enabled)
        self.path = settled(path)  # scripts may change the working directory
        self.plan = self.settings.plan()
        self.session = Session(
            self.plan,
            self.settings.snapshot_every,
            rank=rank,
            processes=processes,
            thumbnails=self.settings.thumbnails,
        )
        self.identity = Identity(self.settings.sample_ids)
        self.alerts = Alerts.of(self.settings.alerts)
        self._models = Models(self._on_forward, self._on_output)
        self._frozen = FrozenDenoiser(
            self._models.together, self._on_frozen_forward, self._on_output, self._on_frozen_found
        )
        self.later(self._frozen.leave)
        self._optimizer: torch.optim.Optimizer | None = None
        self._scaler: GradScaler | None = None
        self._ranks: Ranks | None = None
        self._loader: Any = None  # of the training, where an adapter knows it
        self._scales: tuple[float, float] | None = None  # of the losses within step()
        self._resumed = False
        self._lr_sum = 0.0  # of the steps since the last snapshot, when resuming
        self._after: str | None = None  # id of the session that the checkpoint is of
        for given in model_and_optimizer:
            self.watch(given)

    @property
    def step_count(self) -> int:
        """Optimiser steps taken."""
        return self.session.step_count

    # ── what the loop says ────────────────────────────────────────────────────────────────────

    def watch(self, given: nn.Module | torch.optim.Optimizer | GradScaler) -> None:
        """Watch a trained model's calls, an optimiser's steps, or a scaler's scale.

        Raises:
            ConfigurationError: the model is compiled, or its parameters are sharded over processes.
        """
        if self.closed:
            return
        with self.guarded():
            if isinstance(given, nn.Module):
                self._watch_model(given)
            elif isinstance(given, GradScaler):
                self._scaler = given
            elif self._optimizer is None:  # a step is counted once, by the first optimiser
                self._optimizer = given
                self.later(Weak(self._before_step, given.register_step_pre_hook).remove)
                self.later(Weak(self._on_step, given.register_step_post_hook).remove)
                self.replace(given, "zero_grad", self._on_zero_grad)

    def _watch_model(self, model: nn.Module) -> None:
        undos = self._models.add(model)
        if undos:
            self.claim(model)
        for undo in undos:
            self.later(undo)

    @contextmanager
    def step(
        self, *, sample_ids: Any, timesteps: Any = None, loss_scale: float = 1.0, batch: Any = None
    ) -> Iterator[None]:
        """Name the samples of one micro-batch, around its forward and backward.

        Args:
            sample_ids: (B,) integers in [0, 2^51), or B strings: one for each row that the model is called
                on. Rows of one sample, such as the frames of a video, have its id, each of them.
            timesteps: (B,) numbers in the scheduler's units, or one for all rows; None to read them from the
                model's arguments, divided by the objective's ``timestep_scale`` where there is one.
            loss_scale: for a loop that calls ``loss.backward()`` itself: factor on the loss besides
                the mean over the batch and a scaler's, such as 1/k when it accumulates k micro-batches.
            batch: what the loop trains on, whose mean, contrast and roughness go into the log; see
                :func:`~diffhook.capture.inputs.default_inputs`.

        Raises:
            ConfigurationError: something else given as ids.
        """
        if self.closed:
            yield
            return
        with self.guarded():
            ids = self.identity.named(sample_ids, "sample_ids")
            named = None if timesteps is None else torch.as_tensor(timesteps).detach().flatten()
            self.session.batch(ids, named, batch)
            self._scales = scale_of(self._scaler), loss_scale  # before the loop updates the scaler
        try:
            yield
        except BaseException:
            self.session.abandon()
            self._scales = None
            raise
        self._finish_pass()
        self._scales = None
        with self.guarded():
            self.session.batch(None)

    def _finish_pass(self) -> None:
        """The backward within :meth:`step` is over: at its end, or where the optimiser steps."""
        scales = self._scales
        if scales is not None and self.session.in_pass:
            self._scales = None
            with self.guarded():
                self.session.backward(None, *scales)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint that is being written; takes a snapshot, and sees all rows to disk.

        Those of every process, even if the first one alone calls this.
        """
        recorder, lr_sum = self.session.recorder, self._lr_sum
        if recorder is not None:
            with self.guarded():
                self.session.snapshot()
                self._settle(self.step_count)
                lr_sum = recorder.lr_sum
                late = [] if self._ranks is None else self._ranks.settle_all(self.step_count)
                if late:
                    logger.warning("rows of ranks %s before this checkpoint may not be on disk yet", late)
        session = self._after if recorder is None else recorder.writer.position()
        return checkpoint.Position(self.step_count, lr_sum, session).to_json()

    def _settle(self, step: int) -> bool:
        """See all rows to disk, unless not all ``step`` steps have been taken."""
        recorder = self.session.recorder
        if recorder is not None and self.step_count >= step:
            recorder.settle()
        return self.step_count >= step

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Training goes on from a checkpoint. Rows of later steps are superseded.

        Args:
            state: what :meth:`state_dict` gave; empty for a checkpoint written without us, whose
                steps are read off the optimiser.
        """
        with self.guarded():
            self._resumed = True
            self._end_log()
            position = checkpoint.Position.from_json(state)
            self.session.step_count = position.step
            self._lr_sum, self._after = position.lr_sum, position.session

    # ── what hooks tell ───────────────────────────────────────────────────────────────────────

    def _on_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.closed or not self.session.expects():
            return
        with self.guarded():
            if self.session.recorder is None:
                self._start()
            self.session.forward(model, args, kwargs)
            if self.session.timesteps is not None:
                self._frozen.stop()
            elif self.session.in_pass:
                self._frozen.look()

    def _on_frozen_found(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        if not self.closed:
            with self.guarded():
                self.session.through(model, args, {})
                if self.session.timesteps is None:  # told by keyword: seen from the next batch on
                    self.session.abandon()

    def _on_frozen_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.closed and torch.is_grad_enabled():
            with self.guarded():
                self.session.through(model, args, kwargs)

    def _on_output(self, model: nn.Module, args: Any, output: Any) -> None:
        if not self.closed and torch.is_grad_enabled():
            with self.guarded():
                self.session.output(model, output)

    def _before_step(self, *_: object) -> None:
        self._finish_pass()
        self.session.in_step = True

    def _on_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self._finish_pass()  # of its closure
        self.session.in_step = False
        with self.guarded():
            if overflowed(optimizer):
                self.session.skipped()
                return
            self.session.stepped(optimizer)

    def _on_zero_grad(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        if self.session.in_step:
            self._finish_pass()  # of a closure that is called again
        original(*args, **kwargs)
        with self.guarded():
            self.session.zeroed()

    # ── beginning and end ─────────────────────────────────────────────────────────────────────

    def _start(self) -> None:
        """At the first training forward: adapters, freezing and resuming are settled by then."""
        settings, session = self.settings, self.session
        model = self._models.together()
        refuse_compiled(model)
        refuse_sharded(model)
        engine = PerSampleGradients(
            model,
            projection_dim=settings.projection_dim,
            seed=settings.seed,
            reuse_products=settings.reuse_products,
            workspace=settings.workspace,
        )
        self.claim((self.path, session.rank))  # the hook of a run that has died, in a notebook say
        probe = training_probe(settings.probe, settings.objective, self._loader, self.identity)
        if session.step_count == 0:
            session.step_count = self._steps_before()
        ranks = Ranks(session.rank, session.processes, self._settle)
        recorder = Recorder(
            engine,
            self.path,
            describe_run(engine, settings.objective, self._loader),
            rank=session.rank,
            processes=session.processes,
            start_step=session.step_count,
            after=self._after,
            run=ranks.agree_on_run(),
            lr_sum=self._lr_sum,
            alerts=self.alerts,
            objective=settings.objective,
            probe=probe,
            preconditioner=self._preconditioner if settings.keep_preconditioner else None,
            strict=settings.strict,
        )
        session.recorder, self.started = recorder, True
        self._ranks = ranks
        ranks.listen()
        session.began = time.perf_counter()
        recorder.keep_names(self.identity.names)
        if session.rank == 0:
            ids = session.sample_ids
            batch = (0 if ids is None else len(ids)) * session.processes
            # Not a stream's: it would warn of every batch beyond the length it was asked for.
            sized = self._loader is not None and not isinstance(self._loader.dataset, IterableDataset)
            batches = len(self._loader) if sized else None
            text = plan_text(
                self.plan, recorder, batch, batches, settings.snapshot_every, self.identity.found
            )
            recorder.writer.record("plan.json", {"text": text.splitlines()})
            print(text, flush=True)

    def _preconditioner(self, parameters: Mapping[str, nn.Parameter]) -> Mapping[str, Tensor]:
        return adam_preconditioner(self._optimizer, parameters)

    def _steps_before(self) -> int:
        """Steps that were taken without us, so that the log counts as the run does."""
        taken = 0 if self._optimizer is None else checkpoint.steps_taken(self._optimizer)
        return taken or (checkpoint.steps_logged(self.path) if self._resumed else 0)

    def finish(self) -> None:
        """The last snapshot and the summary."""
        session, recorder = self.session, self.session.recorder
        if recorder is not None:
            if session.step_count:
                session.snapshot()
            numbers, text = summary(self.plan, recorder, time.perf_counter() - session.began)
            if session.rank == 0:
                recorder.writer.record("summary.json", numbers)
            try:
                self._end_log()
            except LogError as error:
                text += f"\n  {error}"
                raise
            finally:
                if session.rank == 0:
                    print(text, flush=True)
        elif not self.started:
            logger.warning("diffhook captured nothing: %s", self.why_nothing())

    def why_nothing(self) -> str:
        """Why nothing was captured, and what to do."""
        if not len(self._models):
            return "no model with trainable parameters was seen"
        return (
            "no training batch with sample ids was seen: name the samples with "
            "hook.step(sample_ids=..., timesteps=...)"
        )

    def release(self, *, mid_pass: bool) -> None:
        try:
            self._end_log(mid_pass=mid_pass)
        except Exception as error:  # the error that brought us here has been told
            logger.debug("closing the log: %s", error)

    def _end_log(self, *, mid_pass: bool = False) -> None:
        recorder, self.session.recorder = self.session.recorder, None
        ranks, self._ranks = self._ranks, None
        if recorder is not None and ranks is not None:
            with ranks.leaving():
                recorder.close(mid_pass=mid_pass)
