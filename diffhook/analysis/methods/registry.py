"""The methods by name."""

from __future__ import annotations

from diffhook.analysis.methods.method import Method
from diffhook.errors import ConfigurationError

METHODS: dict[str, Method] = {}


def register(kind: type[Method]) -> type[Method]:
    """Class decorator: the class, with its defaults, under its name."""
    METHODS[kind.name] = kind()
    return kind


def find_method(method: str | Method) -> Method:
    """The method of that name; a Method is its own.

    Raises:
        ConfigurationError: there is none; names those there are.
    """
    if isinstance(method, Method):
        return method
    if method not in METHODS:
        raise ConfigurationError(f"no method {method!r}; there are {', '.join(sorted(METHODS))}")
    return METHODS[method]
