"""The methods by name."""

from __future__ import annotations

from diffhook.analysis.methods.method import Method
from diffhook.contract import check_answers, check_name
from diffhook.errors import ConfigurationError
from diffhook.words import guess

METHODS: dict[str, Method] = {}
DEFAULT = "whitened-retrac"
COMPARED = (DEFAULT, "retrac", "tracin")
"""What pages and diagnostics set beside each other: the default, and the paper's two."""


_QUESTIONS = {
    "name": 'name, by which influence(method="...") finds it',
    "title": "title, what tables and pages call it",
    "formula": "formula, for `diffhook influence --method help`",
    "reference": "reference, where the formula is from",
}


def register(kind: type[Method]) -> type[Method]:
    """Class decorator: the class, with its defaults, under its name.

    Raises:
        ConfigurationError: it leaves out an answer, or another class has its name.
    """
    check_answers(kind, Method, "method", _QUESTIONS)
    check_name(kind, kind.name, "the method", METHODS)
    METHODS[kind.name] = kind()
    return kind


def title_of(name: str) -> str:
    """What tables and pages call the method of that name; the name itself of a method of the user's own."""
    return METHODS[name].title if name in METHODS else name


def find_method(method: str | Method) -> Method:
    """The method of that name; a Method is its own.

    Raises:
        ConfigurationError: there is none; names those there are.
    """
    if isinstance(method, Method):
        return method
    if method not in METHODS:
        known = ", ".join(sorted(METHODS))
        raise ConfigurationError(f"no method {method!r}; there are {known}.{guess(method, METHODS)}")
    return METHODS[method]
