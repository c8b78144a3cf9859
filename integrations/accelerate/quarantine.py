"""Keeps quarantined samples out of a prepared loader, without a word between processes.

Each process replaces a quarantined index in its own batches by one that its own sampler has given it
in the same pass. Batches keep their number and sizes whatever any process knows, so none waits for
another; a healthy sample is seen twice instead.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import IterableDataset

from diffhook.capture import Alerts, Quarantine
from diffhook.capture.loop.identity import Identity
from diffhook.capture.loop.identity.loader_tracker import LoaderTracker
from diffhook.capture.loop.watches.attachment import Shield
from diffhook.gradients import Guarded
from diffhook.integrations.accelerate import loaders
from diffhook.integrations.accelerate.stand_in import StandIn

logger = logging.getLogger("diffhook")

_STAND_INS = 1024  # healthy indices of the pass that are remembered


class _HealthyBatches(StandIn):
    """A batch sampler, but with other samples in place of quarantined ones."""

    def __init__(self, batches: Any, left_out: Callable[[], frozenset[int]], shield: Shield) -> None:
        super().__init__(batches)
        self.__dict__.update(_left_out=left_out, _shield=shield)

    def __iter__(self) -> Iterator[Any]:
        replacing = self._shield(_Replacing, self._left_out, self._shield)
        return iter(self._original) if replacing is None else map(replacing, self._original)


class _Replacing(Guarded):
    """Replaces the quarantined indices of each batch of one pass."""

    def __init__(self, left_out: Callable[[], frozenset[int]], shield: Shield) -> None:
        self._left_out = left_out()
        self._shield = shield
        self._stand_ins: deque[Any] = deque(maxlen=_STAND_INS)

    def run(self, batch: Any) -> Any:
        healthy = [index for index in batch if index not in self._left_out]
        self._stand_ins.extendleft(reversed(healthy))  # this batch's are the last to be taken
        if len(healthy) == len(batch) or not self._stand_ins:
            return batch
        return [index if index not in self._left_out else self._next() for index in batch]

    def failed(self, error: Exception, batch: Any) -> Any:
        self._shield.keep(error)
        return batch

    def _next(self) -> Any:
        """The healthy index that was seen, or has stood in, longest ago."""
        self._stand_ins.rotate(1)
        return self._stand_ins[0]


def leave_out(
    loader: Any, alerts: Alerts, data: LoaderTracker, identity: Identity, shield: Shield
) -> Callable[[], None]:
    """Keep the quarantine's samples out of a loader from its next pass on, if it is trained on.

    Returns what undoes it.
    """
    quarantine, base = alerts.quarantine, getattr(loader, "base_dataloader", loader)
    if not isinstance(quarantine, Quarantine):
        return lambda: None
    if base.batch_sampler is None or isinstance(base.dataset, IterableDataset):
        logger.warning("the quarantine leaves nothing out of a stream: its samples cannot be chosen")
        return lambda: None

    def left_out() -> frozenset[int]:
        if not data.trains(dataset):
            return frozenset()
        return data.places(dataset, quarantine.begin_pass(len(base.dataset)), identity)

    sampler, dataset = base.batch_sampler, loaders.users_own(base.dataset)
    base.__dict__["batch_sampler"] = _HealthyBatches(sampler, left_out, shield)

    def undo() -> None:
        base.__dict__["batch_sampler"] = sampler

    return undo
