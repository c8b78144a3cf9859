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
from diffhook.capture.loop.loader_tracker import LoaderTracker
from diffhook.integrations.accelerate import loaders

logger = logging.getLogger("diffhook")

_STAND_INS = 1024  # healthy indices of the pass that are remembered


class _HealthyBatches:
    """A batch sampler, but with other samples in place of quarantined ones.

    All else is the sampler's own, attributes that accelerate sets included.
    """

    def __init__(self, batches: Any, left_out: Callable[[], frozenset[int]]) -> None:
        self.__dict__.update(batches=batches, left_out=left_out)

    def __iter__(self) -> Iterator[Any]:
        left_out = self.left_out()
        stand_ins: deque[Any] = deque(maxlen=_STAND_INS)
        for batch in self.batches:
            healthy = [index for index in batch if index not in left_out]
            stand_ins.extendleft(reversed(healthy))  # this batch's are the last to be taken
            if len(healthy) == len(batch) or not stand_ins:
                yield batch
                continue
            yield [index if index not in left_out else _next(stand_ins) for index in batch]

    def __len__(self) -> int:
        return len(self.batches)

    def __getattr__(self, name: str) -> Any:
        if name == "batches":  # while unpickling in a worker
            raise AttributeError(name)
        return getattr(self.batches, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.batches, name, value)


def _next(stand_ins: deque[Any]) -> Any:
    """The healthy index that was seen, or has stood in, longest ago."""
    stand_ins.rotate(1)
    return stand_ins[0]


def leave_out(loader: Any, alerts: Alerts, data: LoaderTracker, identity: Identity) -> Callable[[], None]:
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
    base.__dict__["batch_sampler"] = _HealthyBatches(sampler, left_out)

    def undo() -> None:
        base.__dict__["batch_sampler"] = sampler

    return undo
