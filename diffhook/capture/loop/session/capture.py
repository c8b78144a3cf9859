"""One capture of a training loop: attached to it, fed by events, ended when the loop ends."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.amp import GradScaler

from diffhook.capture.alerts import Alerts
from diffhook.capture.checks import check_location
from diffhook.capture.loop import events
from diffhook.capture.loop.identity import Identity, RowIds
from diffhook.capture.loop.losses.objective_watch import ObjectiveWatch
from diffhook.capture.loop.micro_batch import MicroBatch
from diffhook.capture.loop.probes.probing import training_probe
from diffhook.capture.loop.run import checkpoint
from diffhook.capture.loop.run.describe import dataset_size, describe_run
from diffhook.capture.loop.run.ranks import Ranks
from diffhook.capture.loop.run.succession import Succession
from diffhook.capture.loop.run.summary import tell_plan
from diffhook.capture.loop.session.ending import recorded_summary, take_last, tell_nothing
from diffhook.capture.loop.session.failures import Failures, reason_of
from diffhook.capture.loop.session.objective_told import ObjectiveNews, await_objective
from diffhook.capture.loop.session.session import CaptureSession
from diffhook.capture.loop.session.settling import Settling
from diffhook.capture.loop.session.staging import Staging
from diffhook.capture.loop.session.uncompiled_steps import UncompiledSteps
from diffhook.capture.loop.watches import BackwardWatch, CallWatch, ModelWatch, OptimizerWatch
from diffhook.capture.loop.watches.attachment import Attachment, Shield, close_at_exit, let_go
from diffhook.capture.loop.watches.call_inspection import named_timesteps
from diffhook.capture.projection_dim import known_dim, usual_dim
from diffhook.capture.recording.recorder import Recorder
from diffhook.capture.settings import Settings
from diffhook.console import announce
from diffhook.errors import LogError
from diffhook.gradients import PerSampleGradients
from diffhook.gradients.sharding import refuse_miscounted
from diffhook.log.store import Location, settled

logger = logging.getLogger("diffhook")


class Capture:
    """What every adapter holds: it translates its framework into :meth:`on`, and says what to watch.

    An exception of ours costs the micro-batch at hand, is told, and the next one is tried; after
    :data:`~diffhook.capture.loop.session.failures.IN_A_ROW` such failures in a row, or once the log has given
    up, the capture ends. Bad use is raised before the first captured step, and everything with ``strict``.

    Args:
        path: the log: a folder, an fsspec URL, or a zarr Store.
        settings: see :class:`~diffhook.capture.settings.Settings`.
        rank, processes: this process's number, and how many share the batch.
        alerts: in place of the settings'.
    """

    def __init__(
        self,
        path: Location,
        settings: Settings,
        *,
        rank: int = 0,
        processes: int = 1,
        alerts: Alerts | None = None,
    ) -> None:
        if settings.enabled:
            check_location(path)
        self.closed = not settings.enabled
        self.settings = settings
        self.path = settled(path)  # scripts may change the working directory
        self.identity = Identity(settings.sample_ids)
        self.alerts = Alerts.of(settings.alerts) if alerts is None else alerts
        self.loader: Any = None  #: of the training, where the adapter knows it
        #: the adapter's, if nothing is captured
        self.reasons_for_nothing: Callable[[], str | None] = lambda: None
        self._process = os.getpid()
        self._failures = Failures(settings.strict)
        self._succession = Succession()
        self._resumed = False
        self._position = checkpoint.Position()  # of the checkpoint that training goes on from
        self._began = time.perf_counter()
        self.shield = Shield(self._failed)
        self.attachment = Attachment(self.shield, self._give_way)
        news = ObjectiveNews(settings, lambda: self.session)
        self.session = CaptureSession(
            settings.plan(),
            self._start,
            lambda: self._optimizers.sees_steps,
            snapshot_every=settings.snapshot_every,
            rank=rank,
            processes=processes,
            staging=partial(
                Staging,
                objective=ObjectiveWatch.of(settings, self.attachment, news.judged, news.no_inputs),
                reduction=settings.reduction,
                thumbnails=settings.thumbnails,
                shield=self.shield,
            ),
            shield=self.shield,
        )
        self._settling = Settling(self.session)
        self.session.rows.wanted = self.session.staging.throttling.is_active
        if not self.closed:
            self._watch_loop()

    def _watch_loop(self) -> None:
        self.models = ModelWatch(self.attachment, self.on, self.settings.models)
        self._calls = CallWatch(self.attachment, self.on, self.models, self.session)
        self._backward = BackwardWatch(self.attachment, self.on, self.session.rows.pause)
        self._optimizers = OptimizerWatch(
            self.attachment, self.on, self.models.moved_by, self._settling.optimizer_saved
        )
        self._uncompiled = UncompiledSteps(self.attachment, self.models, self.session)
        self.attachment.on_detach(self.session.rows.rest)
        close_at_exit(self.close)

    # ── what adapters say ─────────────────────────────────────────────────────────────────────

    def on(self, event: events.Event) -> None:
        """Take the next event of the loop. What fails in us does not reach the loop."""
        for take in (self.session.staging.read_before, self._take):  # rows that fail cost no event
            if not self.closed:
                self.shield(take, event)

    def _take(self, event: events.Event) -> None:
        session = self.session
        begins = isinstance(event, events.BackwardBegan) and session.in_pass
        if begins or isinstance(event, events.BatchReceived):
            self._optimizers.new_step()
        session.on(event)
        if session.expects_backward:
            self._backward.arm()
        else:
            self._backward.disarm()
        self._calls.follow(event)
        self._uncompiled.follow(event)

    def watch(self, *given: nn.Module | torch.optim.Optimizer | GradScaler) -> None:
        """Watch trained models' calls, an optimiser's steps, or a scaler's scale.

        Raises:
            ConfigurationError: the model's parameters are sharded in a way that is not supported.
        """
        for one in () if self.closed else given:
            self.shield(self._watch, one)

    def _watch(self, given: nn.Module | torch.optim.Optimizer | GradScaler) -> None:
        if isinstance(given, nn.Module):
            self.models.add(given)
        else:
            self._optimizers.add(given)

    def place(self, rank: int, processes: int) -> None:
        """Say which process this is, where that is known only once training starts."""
        self.session.steps.rank, self.session.steps.processes = rank, processes

    @contextmanager
    def step(
        self, *, sample_ids: Any, timesteps: Any = None, loss_scale: float = 1.0, batch: Any = None
    ) -> Iterator[None]:
        """See :meth:`diffhook.integrations.hook.Hook.step`."""
        self.shield(self._name, sample_ids, timesteps, loss_scale, batch)
        try:
            yield
        finally:
            self.shield(lambda: self.on(events.LoaderEnded()))

    def _name(self, sample_ids: Any, timesteps: Any, loss_scale: float, batch: Any) -> None:
        if self._is_over():
            return
        ids = self.identity.named(sample_ids, "sample_ids")
        named = None if timesteps is None else named_timesteps(timesteps)
        self.on(events.BatchReceived(RowIds(ids, "hook.step"), batch, named))
        self.on(events.LossScaled(self.scale(), loss_scale))

    def scale(self) -> float:
        """By what the loop's scaler multiplies losses. Read in captured steps alone, for it waits."""
        return self._optimizers.scale() if self.session.steps.captured else 1.0

    def state(self) -> dict[str, Any]:
        """For a checkpoint that is being written; takes a snapshot, and sees all rows to disk.

        Those of every process, even if the first one alone calls this.
        """
        return {} if self._is_over() else self.shield(self._state) or {}

    def _state(self) -> dict[str, Any]:
        session, lr_sum, after = self.session, self._position.lr_sum, self._position.session
        if session.recorder is not None:
            session.on(events.SnapshotDue())
            self._settling.everyone()
            lr_sum, after = session.recorder.lr_sum, session.recorder.writer.position()
        step = session.steps.count and session.steps.count + session.steps.unlogged  # 0: not known yet
        counted = self._optimizers.steps_taken or step
        return checkpoint.Position(step, lr_sum, after, step - counted).to_json()

    def resume(self, state: Mapping[str, Any]) -> None:
        """Training goes on from a checkpoint. Rows of later steps are superseded.

        Args:
            state: what :meth:`state` gave; empty for a checkpoint written without us, whose steps are
                read off the optimiser.
        """
        self.shield(self._resume, state)

    def _resume(self, state: Mapping[str, Any]) -> None:
        self._resumed = True
        self._end_log()
        self._position = checkpoint.Position.from_json(state)
        self.session.steps.count, self.session.steps.unlogged = self._position.step, 0

    def flush(self) -> None:
        """See the rows of all finished steps to the disk, so that a reader finds them."""
        if not self._is_over():
            self.shield(self.session.settle_held)
            self.shield(self._settling.own)

    def scalars(self) -> dict[str, float]:
        """A few numbers of what was captured since they were last asked for, for a tracker."""
        recorder = self.session.recorder
        return {} if self.closed or recorder is None else self.session.staging.scalars.take(recorder.alerts)

    # ── beginning ─────────────────────────────────────────────────────────────────────────────

    def _start(self, batch: MicroBatch) -> Recorder:
        """At the first training forward: adapters, freezing and resuming are settled by then."""
        settings, session = self.settings, self.session
        session.absences.tell_models(self.models.settle(self._optimizers.known))
        engine = self._engine()
        self.attachment.own((self.path, session.steps.rank))  # sees off a run that has died
        session.steps.count = self._steps_before()
        session.steps.unlogged = 0
        ranks = Ranks(session.steps.rank, session.steps.processes, self._settling.own)
        probed = session.staging.objective.begin(engine.model, self.loader, settings.probed, ranks.probes)
        recorder = Recorder(
            engine,
            self.path,
            describe_run(engine, settings.objective, self.loader, batch.images),
            rank=session.steps.rank,
            processes=session.steps.processes,
            start_step=session.steps.count,
            after=self._position.session,
            run=ranks.agree_on_run(),
            lr_sum=self._position.lr_sum,
            alerts=self.alerts,
            objective=settings.objective,
            probe=training_probe(probed, settings.objective, self.loader, self.identity),
            sharing=ranks.shared_probe,
            probe_at_end=settings.probes_at_end and probed is not None,
            preconditioner=self._optimizers.preconditioner if settings.keep_preconditioner else None,
            snapshot_dtype=settings.snapshot_precision(),
            meet=ranks.meet,
            strict=settings.strict,
        )
        with ExitStack() as undo:
            undo.callback(recorder.close)
            if session.steps.processes == 1:  # else the others would wait for this one
                recorder.incoming.recognise(batch.ids, batch.images, self.identity.telling_names)
            await_objective(session.staging.objective.inputs, recorder)
            self._settling.ranks = ranks
            ranks.listen()
            self._began = time.perf_counter()
            recorder.keep_names(self.identity.names, telling=self.identity.datasets.is_one)
            recorder.regularisation = self.identity.regularisation
            session.staging.throttling.watch = recorder.watch
            rows = len(batch.ids) * session.steps.processes
            tell_plan(session.plan, recorder, rows, self.loader, settings.snapshot_every, self.identity.found)
            undo.pop_all()
        self._failures.started = True
        return recorder

    def _engine(self) -> PerSampleGradients:
        """Of the models that count, with projections as the settings or the log have them."""
        settings, dim = self.settings, self.settings.projection_dim
        if dim is None:
            dim = known_dim(self.path) or usual_dim(dataset_size(self.loader))
        engine = PerSampleGradients(
            self.models.together(),
            layers=settings.layers,
            projection_dim=dim,
            seed=settings.seed,
            reduction=settings.reduction,
            reuse_products=settings.reuse_products,
            workspace=settings.workspace,
        )
        refuse_miscounted(engine.model, self.session.steps.processes)
        return engine

    def _steps_before(self) -> int:
        """Steps that were taken without us, so that the log counts as the run does."""
        steps, counted = self.session.steps, self._optimizers.steps_taken
        if not steps.count:
            return counted or (checkpoint.steps_logged(self.path) if self._resumed else 0) + steps.unlogged
        self._position = self._position.checked(steps.count + steps.unlogged, counted)
        return self._position.step

    # ── failure and end ───────────────────────────────────────────────────────────────────────

    def _failed(self, error: Exception) -> None:
        """An exception of ours has reached the shield."""
        verdict = self._failures.judge(error, self.session.staging.passes)
        try:
            self.session.failed(reason_of(error))
        except Exception as another:  # not even that: better to go than to be in the way
            logger.error("diffhook has stopped capturing; training goes on. %s", another)
            self.detach(mid_pass=True)
        if verdict != "go on" or self.closed:
            self.detach(mid_pass=verdict == "stop")
        if verdict == "raise":
            raise error

    def close(self, *, at_exit: bool = False) -> None:
        """Write what is left and leave everything as it was before us. Idempotent.

        Args:
            at_exit: the interpreter ends, and the loop has not said that it is over.
        """
        if self.closed or os.getpid() != self._process:  # a DataLoader's worker is not the run
            return
        try:
            self.shield(self._finish, at_exit)
        finally:
            self.closed = True
            self.shield(self.detach)

    def __del__(self) -> None:
        if getattr(self, "_process", None) == os.getpid() and not self.closed:  # None: half-made
            let_go(self.detach)

    def _give_way(self) -> None:
        """Another hook of this process has come to our loop, or to our log."""
        self._succession.gave_way(self.path, self.session.recorder, self.detach())

    def _is_over(self) -> bool:
        """Asked by what the loop itself calls."""
        if self.closed:
            self._succession.used()
        return self.closed

    def detach(self, *, mid_pass: bool = False) -> Exception | None:
        """Take everything of ours off; what has been captured is kept.

        Args:
            mid_pass: the training goes on, perhaps with the backward of a forward that we have seen.

        Returns:
            Why the log could not be ended, if so.
        """
        self.closed = True
        try:
            self.attachment.detach()
        finally:
            try:
                self._end_log(mid_pass=mid_pass)
            except Exception as error:  # an error that brought us here has been told
                logger.debug("closing the log: %s", error)
                return error
        return None

    def _finish(self, at_exit: bool) -> None:
        """The last snapshot, the last probe, and the summary."""
        session, recorder = self.session, self.session.recorder
        if recorder is None:
            reason = self.reasons_for_nothing()
            tell_nothing(session, reason, len(self.models), resumed=self._failures.started, at_exit=at_exit)
            return
        try:
            take_last(session, self.settings, time.perf_counter() - self._began, at_exit=at_exit)
            recorder.finish()  # the summary counts all rows
        finally:
            text = recorded_summary(session, recorder, time.perf_counter() - self._began)
            try:
                self._end_log()
            except LogError as error:
                text += f"\n  {error}"
                raise
            finally:
                if session.steps.rank == 0:
                    announce(text)

    def _end_log(self, *, mid_pass: bool = False) -> None:
        recorder, self.session.recorder = self.session.recorder, None
        ranks, self._settling.ranks = self._settling.ranks, None
        if recorder is None or ranks is None:
            return
        try:
            with ranks.leaving():
                recorder.close(mid_pass=mid_pass)
        except BaseException:
            recorder.close(mid_pass=mid_pass)  # what has failed is tried again
            raise
