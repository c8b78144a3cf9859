"""Every error that diffhook raises on purpose."""

from __future__ import annotations

from collections.abc import Iterable

from diffhook.words import printable


class DiffHookError(Exception):
    """Bad use or bad input: the message says what was found, what was expected and what to do.

    Attributes:
        told: the user knows already: a message was logged when the trouble began.
    """

    told = False

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(str(message)))  # it may quote what a log from elsewhere says


class ConfigurationError(DiffHookError, ValueError):
    """An argument, or a combination of arguments, cannot work."""


class LogError(DiffHookError):
    """A run log is missing, foreign, damaged, or of another configuration."""


class LogUnavailableError(LogError):
    """The place where a log lies cannot be reached or written just now; later it may be."""


class LogBusyError(LogError):
    """Somebody else is writing that part of the log."""


class CaptureError(DiffHookError, RuntimeError):
    """Per-sample gradients could not be formed for a pass; no row of it is kept.

    Attributes:
        kind: what happened, for code that branches on it: "no backward" (no gradient was seen),
            "double backward" (``create_graph=True``, or a second backward of the same forward),
            "outside" (a layer was called outside the watched model), "ragged" (the batch does not
            divide into groups), "uncovered" (no parameter can be split by sample), "unstable" (re-checks
            keep failing), "failed" (an error in a hook).
    """

    def __init__(self, *args: object, kind: str = "failed") -> None:
        super().__init__(*args)
        self.kind = kind


class RecheckNeeded(CaptureError):  # noqa: N818 - not a failure
    """What an earlier pass established no longer holds: this pass is discarded, the next one re-checks.

    Attributes:
        law: "usage" (layers are called in another way), "completeness" (samples' gradients do not add
            up to autograd's) or "separability" (rows of a layer are not one sample each).
        names: the layers or parameters concerned.
    """

    def __init__(self, message: str, *, law: str = "usage", names: Iterable[str] = ()) -> None:
        super().__init__(message, kind="recheck")
        self.law = law
        self.names = tuple(names)
