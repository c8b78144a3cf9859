"""Captured steps of compiled models, which run uncompiled."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Protocol

from diffhook.capture.loop.events import BatchReceived, Event
from diffhook.capture.loop.session.session import CaptureSession
from diffhook.capture.loop.watches.attachment import Attachment
from diffhook.console import announce
from diffhook.gradients.compiled import uncompiled


class Models(Protocol):
    """The trained models that are watched."""

    @property
    def are_compiled(self) -> bool: ...


class UncompiledSteps:
    """Runs compiled code as it was written, from the arrival of a captured step's batch to the step's end.

    The layers of a compiled model make no calls that a hook could see. The other steps run compiled; hooks
    that stay on the model are silent there, so the graph is the loop's own, and compiled once.

    Args:
        attachment: undoes it.
        models: the trained ones.
        session: knows which steps are captured.
    """

    def __init__(self, attachment: Attachment, models: Models, session: CaptureSession) -> None:
        attachment.on_detach(self.leave)
        self._models = models
        self._session = session
        self._compiled = False
        self._entered = ExitStack()
        self._inside = False

    def follow(self, event: Event) -> None:
        """The session has taken ``event``."""
        steps = self._session.steps
        captured = steps.captured or self._session.in_pass
        if captured and not self._compiled and isinstance(event, BatchReceived) and self._models.are_compiled:
            self._compiled = True
            self._session.rows.ahead = False
            self._tell()
        if captured and self._compiled and not self._inside:
            self._entered.enter_context(uncompiled())
            self._entered.enter_context(_hooks_unmentioned())
            self._inside = True
        elif not captured:
            self.leave()

    def leave(self) -> None:
        """Compiled code runs compiled again."""
        self._inside = False
        self._entered.close()

    def _tell(self) -> None:
        stride = self._session.plan.stride
        all_steps = ": with every=1 all of them, so choose a larger one, or overhead=" if stride == 1 else ""
        if self._session.steps.rank == 0:
            announce(f"diffhook: the model is compiled; captured steps run uncompiled{all_steps}")


@contextmanager
def _hooks_unmentioned() -> Iterator[None]:
    """Compiled modules warn of hooks on all modules, such as those by which the denoiser is found."""
    warnings.filterwarnings("ignore", "Using `torch.compile.* global hooks", UserWarning)
    ours = warnings.filters[0]
    try:
        yield
    finally:
        if ours in warnings.filters:
            warnings.filters.remove(ours)  # type: ignore[attr-defined]
