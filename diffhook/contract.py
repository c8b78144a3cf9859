"""What a class must say of itself before it is registered: a layer rule, a method, a signal, a detector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffhook.errors import ConfigurationError


def check_answers(kind: type, base: type, what: str, questions: Mapping[str, str]) -> None:
    """Every question must have an answer that is not the contract's own.

    Args:
        kind: the class to be registered.
        base: the contract that it implements.
        what: what such a class is, such as "layer rule".
        questions: attribute → what it says, in words that begin with its name.

    Raises:
        ConfigurationError: answers are left out; says which, and what they are to say.
    """
    missing = [name for name in questions if getattr(kind, name, None) is getattr(base, name, None)]
    if missing:
        told = "; ".join(questions[name] for name in missing)
        raise ConfigurationError(f"{kind.__name__} is no {what} yet: it leaves out {told}")


def check_name(kind: type, name: str, what: str, known: Mapping[str, Any]) -> None:
    """Raises ConfigurationError if another class has the name. The same class defined anew, as by a cell of a
    notebook that runs again, takes its own place."""
    other = known.get(name)
    if other is None:
        return
    found = other if isinstance(other, type) else type(other)
    if (found.__module__, found.__qualname__) != (kind.__module__, kind.__qualname__):
        raise ConfigurationError(
            f"{kind.__name__} cannot be {what} {name!r}: {found.__module__}.{found.__qualname__} is. Give it "
            "another name"
        )
