"""Two laws that the first pass obeys, and a spot check every so often: what follows if one is broken.

One: the samples' gradients add up to autograd's own, for every parameter (:mod:`.coverage_check`).
Two: the gradient of one sample reaches that sample's row of every layer, no other (:mod:`.separability`).

A checked pass costs about two to three passes; spot checks come at passes 16, 64, 256 and then every 256.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from diffhook.compat.torch import BatchNorm, NormBase
from diffhook.errors import CaptureError, RecheckNeeded
from diffhook.gradients.coverage import Assignment
from diffhook.gradients.separability import SeparabilityCheck
from diffhook.gradients.watched_pass import WatchedPass

_EARLY = (1, 16, 64)
_EVERY = 256
_PATIENCE = 8  # re-checks in a row


class Schedule:
    """Which passes are checked. Deterministic, so that all processes check the same ones.

    Attributes:
        passes: finished since the last full check began.
    """

    def __init__(self) -> None:
        self.passes = 0
        self._rechecks = 0  # in a row

    @property
    def due(self) -> bool:
        """Whether the next pass is to be checked."""
        number = self.passes + 1
        return number in _EARLY or number % _EVERY == 0

    @property
    def first(self) -> bool:
        """Whether the next pass is a full check, whose findings stand, and no spot check."""
        return self.passes == 0

    def passed(self, *, conclusive: bool) -> None:
        self.passes += conclusive
        self._rechecks = 0

    def restart(self, reason: RecheckNeeded) -> None:
        """The next pass is a full check.

        Raises:
            CaptureError: re-checks have failed too often in a row.
        """
        self.passes = 0
        self._rechecks += 1
        if self._rechecks > _PATIENCE:
            raise CaptureError(f"{_PATIENCE} re-checks in a row have failed: {reason}", kind="unstable")


def refuse_missed(watched: WatchedPass) -> None:
    """
    Raises:
        RecheckNeeded: parameters have gradients that the pass has not seen.
    """
    if missed := watched.axis.missed:
        raise RecheckNeeded(
            f"{_some(missed)} went through a function that cannot be seen, elsewhere than when coverage was "
            "checked; this pass is discarded and the next one re-checks",
            names=missed,
        )


def judge(watched: WatchedPass, assignment: Assignment, model: nn.Module, *, first: bool) -> bool:
    """Hold a finished pass to the laws.

    Args:
        assignment: learns which layers are declined and which parameters are left out.
        first: whether this is a full check. Its failures in the fallback are final.

    Returns:
        False if the gradients were not finite, so that nothing could be checked.

    Raises:
        RecheckNeeded: a law is broken, and the next pass will show whether the fallback obeys it.
    """
    separability, completeness = watched.separability, watched.completeness
    if separability is None or completeness is None:
        _refuse_obstacles(watched)
        if assignment.tested_alone and watched.batch != 1:
            raise RecheckNeeded(
                "this is the first batch of more than one sample; it is discarded, and the next one "
                "re-checks that samples stay apart",
                law="separability",
            )
        return True
    assignment.tested_alone = separability.alone
    assignment.unchecked = None
    if separability.violated:
        _name_inseparable(assignment, model, separability.violated.items())
        raise RecheckNeeded(
            f"rows of {_some(separability.violated)} are not one sample each: samples are mixed, reordered, "
            "or another axis is in front; this pass is discarded and the next one follows them",
            law="separability",
            names=separability.violated,
        )
    _settle_unreached(separability, assignment, model)
    failures = completeness.failures(watched.accumulator.pending)
    _settle(failures | watched.obstacles, watched, assignment, first=first)
    return completeness.conclusive


def _settle_unreached(separability: SeparabilityCheck, assignment: Assignment, model: nn.Module) -> None:
    """Layers of which it is not known whether samples stay apart: told, and with batch statistics in the
    model, left out."""
    unreached = separability.unreached - assignment.declined
    if not unreached:
        return
    why = separability.unchecked or "reentrant checkpoints, compiled or distributed parts hide it"
    assignment.unchecked = f"not known of {_some(unreached)} whether samples stay apart ({why})"
    known = batch_statistics(model)
    if known:
        assignment.inseparable.update(known)
        assignment.declined |= unreached
        reason = f"samples are coupled by {_some(known)}, which cannot be followed here"
        # The fallback's as well: behind one such layer there may be another.
        assignment.leave_out(dict.fromkeys(assignment.names_of(unreached) | assignment.fallback, reason))
        raise RecheckNeeded(
            f"{_some(known)} couple samples where it cannot be followed; this pass is discarded, and the "
            f"next one leaves out {_some(unreached)}",
            law="separability",
            names=unreached,
        )


def _refuse_obstacles(watched: WatchedPass) -> None:
    for name, reason in watched.obstacles.items():
        raise RecheckNeeded(f"{name}: {reason}; this pass is discarded", names=watched.obstacles)


def _settle(failures: dict[str, str], watched: WatchedPass, assignment: Assignment, *, first: bool) -> None:
    """Parameters whose rows do not add up: their layer is declined; the fallback's are left out."""
    new = {name: why for name, why in failures.items() if name not in assignment.missing}
    rules = watched.accumulator.taken - assignment.declined
    if taken := watched.axis.take_from_layers(new):
        raise RecheckNeeded(
            f"{_some(sorted(taken))} went through a function that cannot be seen, and whose backward does "
            "not call their layers; this pass is discarded and the next one follows them",
            law="completeness",
            names=sorted(taken),
        )
    declined = {layer for layer in rules if not new.keys().isdisjoint(assignment.names_of([layer]))}
    if declined:
        assignment.declined |= declined
        assignment.fallback |= assignment.names_of(declined) - assignment.missing.keys()
    elif first or not new:
        assignment.leave_out(new)
        return
    raise RecheckNeeded(
        f"the samples' gradients of {_some(new)} do not add up to autograd's; this pass is discarded and "
        "the next one re-checks",
        law="completeness",
        names=new,
    )


def _name_inseparable(assignment: Assignment, model: nn.Module, violated: Iterable[tuple[str, bool]]) -> None:
    known = batch_statistics(model)
    assignment.inseparable.update(known)
    if not known:
        for name, ambiguous in violated:
            if not ambiguous:
                why = "behind it samples are mixed or reordered, or its rows are no samples"
                assignment.inseparable.setdefault(name, why)


def batch_statistics(model: nn.Module) -> dict[str, str]:
    """name → reason, for modules that normalise by statistics of the batch as they stand."""
    return {
        name: f"{type(module).__name__} couples samples by the statistics of the batch"
        for name, module in model.named_modules()
        if isinstance(module, BatchNorm) and (module.training or _has_no_statistics(module))
    }


def _has_no_statistics(module: NormBase) -> bool:
    return module.running_mean is None


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
