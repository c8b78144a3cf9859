"""The end of a training: the last snapshot, the probe that the budget still affords, and the summary."""

from __future__ import annotations

import logging
import sys

from diffhook.capture.loop import events
from diffhook.capture.loop.run.summary import summary, training_seconds, why_nothing
from diffhook.capture.loop.session.session import CaptureSession
from diffhook.capture.recording.recorder import Recorder
from diffhook.capture.settings import Settings
from diffhook.console import announce

logger = logging.getLogger("diffhook")

_ENDS = (GeneratorExit, StopIteration, StopAsyncIteration)  # by which loops end that are well


def take_last(session: CaptureSession, settings: Settings, seconds: float, *, at_exit: bool) -> None:
    """The loop is over: complete what it has left, keep its parameters, and probe all samples.

    Args:
        seconds: since the first captured forward.
        at_exit: the interpreter ends, since the loop never said that it was over.
    """
    if session.steps.count:
        session.on(events.SnapshotDue())
    session.on(events.GradientsZeroed())  # what was staged for a step that never came moves nothing
    session.staging.objective.end(thinned=session.plan.stride > 1)
    if not settings.probes_at_end or not session.steps.count:
        return
    if _died(at_exit):  # nobody wants to wait
        announce("diffhook: no probe at the end, because an error ended the training")
    else:
        session.snapshots.probe_at_end(session.recorder, _seconds_left(session, settings, seconds))


def _seconds_left(session: CaptureSession, settings: Settings, seconds: float) -> float:
    """Of the budget; with a stride that the user has chosen, events have no part in it."""
    assert session.recorder is not None
    training = training_seconds(session.plan, session.recorder, seconds)
    aside = session.recorder.snapshot_seconds
    if session.plan.budget is None:
        return settings.budget.half.of(training) - aside
    return settings.budget.of(training) - aside - session.plan.capture_seconds


def _died(at_exit: bool) -> bool:
    """Whether an error, or Ctrl-C, ends the training."""
    under_way = sys.exc_info()[1]
    if isinstance(under_way, SystemExit):
        return bool(under_way.code)
    if under_way is not None and not isinstance(under_way, _ENDS):
        return True
    return at_exit and hasattr(sys, "last_type")


def tell_nothing(
    session: CaptureSession, reason: str | None, models: int, *, resumed: bool, at_exit: bool
) -> None:
    """Warn that no row was captured, and why.

    Args:
        reason: what the adapter knows.
        models: how many trained ones were seen.
        resumed: rows of before a checkpoint was loaded are in the log.
        at_exit: see :func:`take_last`.
    """
    since = " since the checkpoint was loaded" if resumed else ""
    known = "an error ended the script first" if _died(at_exit) else reason
    logger.warning(
        "diffhook captured nothing%s: %s", since, why_nothing(session.absences.counts, known, models)
    )


def recorded_summary(session: CaptureSession, recorder: Recorder, seconds: float) -> str:
    """What there is to say, which the first process also leaves in the log."""
    numbers, text = summary(session.plan, recorder, seconds, session.absences.counts)
    throttled, told = session.staging.throttling.summary()
    if session.steps.rank == 0:
        recorder.writer.record("summary.json", numbers | throttled)
    return text + told
