"""Every error that diffhook raises on purpose."""

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


class CaptureError(DiffHookError, RuntimeError):
    """Per-sample gradients could not be formed for a pass; no row of it is kept."""


class SurveyAgainError(CaptureError):
    """The model uses a layer in another way than it did: the next pass looks anew, and can be kept."""
