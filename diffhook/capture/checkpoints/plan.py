"""What is to be measured: checkpoints with their weights, set against what a log has of them already."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from diffhook.capture.checkpoints.finding import Checkpoint
from diffhook.capture.checkpoints.rates import EQUAL, GIVEN, learning_rates
from diffhook.errors import LogError
from diffhook.log import RunLog, Snapshot
from diffhook.log.reference import Reference
from diffhook.words import at_steps

logger = logging.getLogger("diffhook")

_WORDS = {
    "optimizer": "by the learning rates in the optimisers' states",
    GIVEN: "by the learning rates that were given",
    EQUAL: "equally: not every checkpoint keeps an optimiser's state (learning_rates=, --learning-rates)",
}


@dataclass(frozen=True)
class PlannedSnapshots:
    """The snapshots that a log is to have.

    Attributes:
        snapshots: by step; each refers to its checkpoint.
        new: those that the log does not have yet, or of which it does not know the place.
        weighted: where the learning rates come from.
    """

    snapshots: list[Snapshot]
    new: list[Snapshot]
    weighted: str

    @property
    def words(self) -> str:
        return f"checkpoints count {_WORDS[self.weighted]}"


def plan(
    checkpoints: Sequence[Checkpoint], log: RunLog | None, given: Sequence[float] | None
) -> PlannedSnapshots:
    """The checkpoints' snapshots, with those that the log has.

    Raises:
        ConfigurationError: learning rates do not fit.
        LogError: they are other checkpoints than the log's.
    """
    known = {snapshot.step: snapshot for snapshot in ([] if log is None else log.snapshots)}
    earlier = [snapshot for step, snapshot in known.items() if step < checkpoints[0].step]
    since = (earlier[-1].step, earlier[-1].lr) if earlier else None
    rates, weighted = learning_rates(checkpoints, given, since)
    if log is not None:
        weighted = _as_before(log, weighted)
    if weighted == EQUAL:
        rates = [(1.0, 1.0)] * len(checkpoints)
    elif known:
        _check_order(checkpoints, known)
    planned = [
        _snapshot(checkpoint, *rate, known.get(checkpoint.step))
        for checkpoint, rate in zip(checkpoints, rates, strict=True)
    ]
    absent = sorted(known.keys() - {snapshot.step for snapshot in planned})
    if absent:
        logger.warning("the log also has checkpoints that are not named now (%s)", at_steps(absent))
    every = {**known, **{snapshot.step: snapshot for snapshot in planned}}
    new = [s for s in planned if s.step not in known or s.reference != known[s.step].reference]
    return PlannedSnapshots([every[step] for step in sorted(every)], new, weighted)


def _as_before(log: RunLog, weighted: str) -> str:
    """As the log's checkpoints were weighted, so are further ones.

    Raises:
        LogError: these cannot.
    """
    before = str(log.config["checkpoints"]["weighted"])
    if before in (EQUAL, weighted):
        return before
    raise LogError(
        f"{log.location} has checkpoints that count {_WORDS[before]}, and these would count "
        f"{_WORDS[weighted]}: name learning rates likewise, or another log"
    )


def _check_order(checkpoints: Sequence[Checkpoint], known: dict[int, Snapshot]) -> None:
    between = [c.step for c in checkpoints if c.step not in known and c.step < max(known)]
    if between:
        raise LogError(
            f"the checkpoint of step {between[0]} lies before that of step {max(known)}, which the log has "
            "already with the learning rates since the one before: measure all of them into another log"
        )


def _snapshot(checkpoint: Checkpoint, lr: float, lr_sum: float, known: Snapshot | None) -> Snapshot:
    """Of a checkpoint as it is now. Its files are read only where the log does not know them."""
    if known is not None and known.reference is not None and _is_same_place(checkpoint, known.reference):
        return known
    reference = Reference.make(checkpoint.path, checkpoint.files, ema=checkpoint.ema)
    if known is None:
        return Snapshot(checkpoint.step, lr, lr_sum, reference=reference)
    if known.reference is not None and known.reference.ema != checkpoint.ema:
        kinds = ("the weights themselves", "the averaged weights")
        raise LogError(
            f"the log was made at {kinds[known.reference.ema]}, and {kinds[checkpoint.ema]} are asked for "
            "(ema, --ema): name another log"
        )
    if known.digest != reference.digest:
        raise LogError(
            f"{checkpoint.path} is not the checkpoint of step {checkpoint.step} that the log was made at: "
            "name another log, or the checkpoints that it is of"
        )
    return replace(known, reference=reference)  # it has moved


def _is_same_place(checkpoint: Checkpoint, reference: Reference) -> bool:
    paths = [path.absolute() for path in checkpoint.files]
    return checkpoint.ema == reference.ema and sorted(paths) == sorted(reference.paths)


def check_log(config: dict[str, Any], where: str) -> None:
    """Raises a LogError where a log is not of checkpoints."""
    if "checkpoints" not in config:
        raise LogError(
            f"the log at {where} is of a training that was watched: name another for its checkpoints"
        )
