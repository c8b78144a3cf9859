"""Wrong use, told where it is made and in one sentence."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Any

from zarr.abc.store import Store

from diffhook.errors import ConfigurationError
from diffhook.words import article, brief, guess


def check_whole(name: str, value: Any, low: int | None = None, high: int | None = None) -> None:
    """Raises ConfigurationError unless ``value`` is a whole number in [low, high]."""
    expected = "a whole number" + (
        "" if low is None else f" from {low} " + ("on" if high is None else f"to {high}")
    )
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigurationError(f"{name} is {value!r}; expected {expected}")
    if (low is not None and value < low) or (high is not None and value > high):
        raise ConfigurationError(f"{name} is {value}; expected {expected}")


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Raises ConfigurationError unless ``value`` is one of ``choices``; says which one may be meant."""
    if value in choices:
        return
    expected = ", ".join(sorted(choices))
    raise ConfigurationError(f"{name} is {value!r}; expected one of {expected}.{guess(value, choices)}")


def check_kind(name: str, value: Any, kind: type, example: str) -> None:
    """Raises ConfigurationError unless ``value`` is of this kind.

    Args:
        example: what to pass, such as "Grid(10)".
    """
    if not isinstance(value, kind):
        raise ConfigurationError(
            f"{name} is {brief(value)}; expected {article(kind.__name__)}, such as {example}"
        )


def check_location(path: Any) -> None:
    """Raises ConfigurationError unless a log can lie at ``path``, as far as that is known without writing."""
    if not isinstance(path, str | os.PathLike | Store):
        raise ConfigurationError(
            f"the log's place is {brief(path)}; expected a folder, a URL or a zarr Store, such as "
            '"runs/butterflies"'
        )
    if isinstance(path, Store) or "://" in str(path):
        return
    place = os.path.abspath(os.path.expanduser(path))
    if os.path.exists(place) and not os.path.isdir(place):
        raise ConfigurationError(f"the log's place {place} is a file; expected a folder")
    while not os.path.exists(place):
        place = os.path.dirname(place)
    if not os.access(place, os.W_OK):
        raise ConfigurationError(f"the log cannot be written at {path}: no permission to write in {place}")
