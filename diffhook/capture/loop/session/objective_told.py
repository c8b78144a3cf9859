"""Tells and records what has come of recognising the training loss."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from diffhook.capture import Objective, Recorder
from diffhook.capture.loop.probes.probe_inputs import ProbeInputs
from diffhook.capture.loop.session.session import CaptureSession
from diffhook.capture.objective.diffusion import DiffusionObjective
from diffhook.capture.recognition import Recognised, Refusal
from diffhook.capture.settings import Settings
from diffhook.console import announce
from diffhook.errors import LogError
from diffhook.log.objective import OBJECTIVE

logger = logging.getLogger("diffhook")


class ObjectiveNews:
    """What is learned of the training loss while the model trains, for the person, the log and the probes.

    Args:
        settings: the user's; an objective that they name is held against what is recognised.
        session: gives the session under way.
    """

    def __init__(self, settings: Settings, session: Callable[[], CaptureSession]) -> None:
        self._settings, self._session = settings, session

    def judged(self, verdict: Recognised | Refusal) -> None:
        """There is a verdict: it is told and recorded, and decides about probes."""
        session, given = self._session(), self._settings.objective
        recorder, inputs = session.recorder, session.staging.objective.inputs
        tell_objective(verdict, given, recorder)
        if recorder is None:
            return
        known = verdict.objective() if isinstance(verdict, Recognised) else _known_before(verdict, recorder)
        recorder.units.learn(1.0 if known is None else known.timestep_scale)
        if inputs is None:
            return
        if recorder.rank == 0:
            recorder.prober.probe_with(known, inputs.probe)
        if known is None and self._settings.probes_at_end:
            self._no_last_probe("it takes the training loss. `diffhook checkpoints` measures samples later")

    def no_inputs(self, reason: str) -> None:
        """Of the samples' inputs none can be kept."""
        recorder = self._session().recorder
        if recorder is not None:
            recorder.prober.probe_none()
        if self._settings.probes_at_end:
            self._no_last_probe(reason)
        else:
            logger.warning("no probes: %s", reason)

    def _no_last_probe(self, reason: str) -> None:
        """Events get what it would have cost."""
        self._session().plan.allow(self._settings.budget)
        if self._session().steps.rank == 0:
            announce(f"diffhook: no probe at the end: {reason}")


def await_objective(inputs: ProbeInputs | None, recorder: Recorder) -> None:
    """Processes beside the first one probe what they have seen, once that has recognised the loss."""
    if inputs is not None and recorder.rank > 0:
        recorder.prober.probe_with(None, inputs.probe)


def tell_objective(verdict: Recognised | Refusal, given: Objective | None, recorder: Recorder | None) -> None:
    """Once for each verdict: to the terminal, and for queries to the log.

    Args:
        given: the objective that the user has named, which is held against the verdict.
        recorder: the first rank's tells.
    """
    if recorder is None or recorder.rank > 0:
        return
    if given is not None:
        wrong = contradiction(given, verdict) if isinstance(verdict, Recognised) else None
        if wrong:
            logger.warning(
                "the objective that was given is not the loss that the training's own gradients show: %s. "
                "Probes and queries differentiate what was given",
                wrong,
            )
        return
    if isinstance(verdict, Refusal) and _known_before(verdict, recorder) is not None:
        return
    known = isinstance(verdict, Recognised)
    announce(f"diffhook: training loss {'recognised' if known else 'not recognised'}: {verdict.words}")
    described = verdict.objective().describe() if isinstance(verdict, Recognised) else None
    recorder.writer.record(OBJECTIVE, {"objective": described, "words": verdict.words})


def _known_before(verdict: Refusal, recorder: Recorder) -> Objective | None:
    """What an earlier session has recognised, where this one was too short to tell."""
    if verdict.early:
        with suppress(LogError):
            found = recorder.writer.past().objective
            return None if found is None else DiffusionObjective.from_description(found)
    return None


def contradiction(given: Objective, found: Recognised) -> str | None:
    """In what an objective that was given differs from the loss that was recognised; None: in nothing.

    A factor on the whole loss is none, and a noise offset is but estimated.
    """
    if not isinstance(given, DiffusionObjective):
        return None
    said, seen = given.describe(), found.objective().describe()
    one, other = (torch.as_tensor(getattr(each.scheduler, "alphas_cumprod", ())) for each in (given, found))
    wrong = [
        f"{name.replace('_', ' ')} {_short(said[name])} (the training's: {_short(seen[name])})"
        for name in ("prediction_type", "distance", "timestep_scale")
        if said[name] != seen[name]
    ]
    if said["weighting"] != seen["weighting"] and said["weighting"]["kind"] != "custom":
        wrong.append(f"weighting {_short(said['weighting'])} (the training's: {_short(seen['weighting'])})")
    if one.shape != other.shape or not torch.allclose(one, other, atol=1e-5):
        wrong.append("noise schedule")
    return ", ".join(wrong) or None


def _short(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    values = [f"{key} {each:.4g}" for key, each in value.items() if key != "kind"]
    return " ".join([value["kind"].replace("_", "-"), *values])
