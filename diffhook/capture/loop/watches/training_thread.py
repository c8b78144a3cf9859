"""Which thread trains: what happens in another one is no part of its loop."""

from __future__ import annotations

import threading

from diffhook.compat.torch import in_backward


class TrainingThread:
    """Knows the thread that calls the trained models.

    The garbage collector runs in whichever thread allocates, such as the log's writer, and ends there what an
    earlier training has left behind, its loaders' passes among it. Loops may fetch batches in threads, too.
    """

    def __init__(self) -> None:
        self._trains: threading.Thread | None = None
        self._fetched: int | None = None  # the thread that the batch came in that came last

    def fetched(self) -> None:
        """A batch of the training comes in this thread."""
        self._fetched = threading.get_ident()

    def trains(self) -> None:
        """A model is called in this thread to be trained."""
        if not in_backward():  # autograd calls checkpointed blocks again, in threads of its own
            self._trains = threading.current_thread()

    @property
    def is_here(self) -> bool:
        """Whether this may be the thread that trains: also where that is not known, or is over."""
        trains = self._trains
        return trains is None or trains.ident == threading.get_ident() or not trains.is_alive()

    @property
    def fetched_elsewhere(self) -> bool:
        """Whether the batch that came last, as seen by a model's call in this thread, came in another one."""
        return self._fetched not in (None, threading.get_ident()) and not in_backward()
