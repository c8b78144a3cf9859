"""What a model says of arguments that it cannot take, as an error of the user's question."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from diffhook.errors import ConfigurationError


@contextmanager
def refused(question: str) -> Iterator[None]:
    """Errors of the model's own become a :class:`ConfigurationError` that begins with ``question``."""
    try:
        yield
    except ConfigurationError:
        raise
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        hint = ": give them as class_labels (--class-labels)" if "class_labels should be" in said else ""
        raise ConfigurationError(f"{question}: {said}{hint}") from error
