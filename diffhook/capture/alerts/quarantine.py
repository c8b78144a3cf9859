"""Samples that are left out of the following epochs."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from diffhook.capture.alerts.alert import Alert
from diffhook.errors import ConfigurationError
from diffhook.log.samples import sample_words

logger = logging.getLogger("diffhook")

_ADD, _REMOVE = "quarantine", "release"
_OUT = "left out from the next epoch on"


class Quarantine:
    """Which samples are left out, from the next pass over the data on. Every change is in the log.

    A process acts on its own findings at once and on those of others when it begins a pass: it
    reads them from the log, without any collective, so a pass that begins within moments of another
    process's finding may still hold the sample. A run that continues a log keeps its quarantine.

    Args:
        kinds: the alerts whose samples are put into it; none: only by hand.
        share: the largest part of the dataset that is left out on account of alerts, those of all processes
            and earlier runs counted. Processes learn of each other when they begin a pass: what several
            find within the same one may exceed it.
    """

    def __init__(
        self, kinds: Sequence[str] = ("non-finite", "repeated-offender"), *, share: float = 0.01
    ) -> None:
        if isinstance(kinds, str):
            raise ConfigurationError(
                f"kinds is {kinds!r}; expected a sequence of kinds, such as ({kinds!r},)"
            )
        if not 0 <= share <= 1:
            raise ConfigurationError(f"share is {share}; expected a part of the dataset, 0 to 1")
        self.kinds = frozenset(kinds)
        self.share = share
        self._samples: set[int] = set()
        self._automatic: set[int] = set()  # of these, those that alerts put there
        self._dataset_size: int | None = None
        self._full = False  # and told so
        self._rank = 0
        self._tell: Callable[[Alert], None] | None = None
        self._read: Callable[[], list[dict[str, Any]]] | None = None
        self._heard: set[tuple[Any, ...]] = set()  # records that count here
        self._waiting: list[Alert] = []  # changes made before there was a log
        self._resumed = False  # what the log says of earlier runs is known
        self.names: Mapping[int, str] = {}  # of samples that have one
        self.step = 0  # optimiser steps taken, as far as rows told

    @property
    def samples(self) -> frozenset[int]:
        """Ids of the samples in quarantine, as this process knows them."""
        return frozenset(self._samples)

    def add(self, samples: int | Iterable[int], reason: str = "by hand") -> None:
        """Leave samples out, from the next pass on."""
        self._change(_ADD, samples, _OUT, reason)

    def remove(self, samples: int | Iterable[int], reason: str = "by hand") -> None:
        """Let samples in again, from the next pass on."""
        self._change(_REMOVE, samples, "let in again from the next epoch on", reason)

    def hear(self, alert: Alert) -> None:
        """An alert was raised: put its samples into quarantine if it is of the kinds for that."""
        new = [s for s in alert.samples if s not in self._samples] if alert.kind in self.kinds else []
        if not new or self._full:
            return
        room = math.inf if self._dataset_size is None else self.share * self._dataset_size
        if len(self._automatic) + len(new) > max(room, 1):
            self._full = True
            self._record(
                "full", [], f"the quarantine has reached {self.share:.1%} of the dataset: alerts add no more"
            )
            return
        self._change(_ADD, new, _OUT, alert.kind, cause=alert.kind)

    # ── called by the capture and by the sampler ──────────────────────────────────────────────

    def bind(
        self, tell: Callable[[Alert], None], read: Callable[[], list[dict[str, Any]]], rank: int
    ) -> None:
        """There is a log now: records go to ``tell``; ``read`` gives the alerts of all processes."""
        self._tell, self._read, self._rank = tell, read, rank
        waiting, self._waiting = self._waiting, []
        self._listen()
        for alert in waiting:
            self._apply(alert.kind, alert.samples, alert.cause)
            tell(alert)

    def begin_pass(self, dataset_size: int) -> frozenset[int]:
        """A pass over the data begins: the samples to leave out of it."""
        self._dataset_size = dataset_size
        self._listen()
        return self.samples

    def _listen(self) -> None:
        """Apply what the log says of other processes and, once, of earlier runs."""
        if self._read is None:
            return
        try:
            records = sorted(self._read(), key=lambda record: record.get("time", 0.0))
        except Exception as error:  # another process is just making its part of the log
            logger.debug("the quarantine is read again at the next pass: %s", error)
            return
        for record in records:
            rank, kind = record.get("rank", 0), record["kind"]
            if kind not in (_ADD, _REMOVE) or (rank == self._rank and self._resumed):
                continue
            known = (rank, record.get("time", 0.0), kind, *record["samples"])
            if known not in self._heard:
                self._heard.add(known)
                self._apply(kind, record["samples"], record.get("cause"))
        self._resumed = True

    def _apply(self, kind: str, samples: Sequence[int], cause: str | None) -> None:
        if kind == _ADD:
            self._samples.update(samples)
            if cause is not None:
                self._automatic.update(samples)
        elif kind == _REMOVE:
            self._samples.difference_update(samples)
            self._full = self._full and self._automatic.isdisjoint(samples)  # else there is room again
            self._automatic.difference_update(samples)

    def _change(
        self, kind: str, samples: int | Iterable[int], what: str, reason: str, cause: str | None = None
    ) -> None:
        named = [int(samples)] if isinstance(samples, int) else [int(s) for s in samples]
        if any(s < 0 for s in named):
            raise ConfigurationError(f"sample id {min(named)} is negative; expected 0 or more")
        changed = [s for s in named if (s in self._samples) != (kind == _ADD)]
        if changed:
            self._apply(kind, changed, cause)
            who = (
                f"sample {sample_words(changed[0], self.names)} is"
                if len(changed) == 1
                else f"{len(changed)} samples are"
            )
            self._record(kind, changed, f"{who} {what} ({reason})", cause)

    def _record(self, kind: str, samples: list[int], message: str, cause: str | None = None) -> None:
        held = len(self._samples)
        alert = Alert(kind, "warning", samples, self.step, math.nan, held, math.nan, message, cause=cause)
        if self._tell is None:
            self._waiting.append(alert)
        else:
            self._tell(alert)
