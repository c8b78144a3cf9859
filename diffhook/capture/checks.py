"""Wrong use, told where it is made and in one sentence."""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection
from typing import Any

from zarr.abc.store import Store

from diffhook.errors import ConfigurationError


def check_whole(name: str, value: Any, low: int, high: int | None = None) -> None:
    """Raises ConfigurationError unless ``value`` is a whole number in [low, high]."""
    expected = f"a whole number from {low}" + (" on" if high is None else f" to {high}")
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigurationError(f"{name} is {value!r}; expected {expected}")
    if value < low or (high is not None and value > high):
        raise ConfigurationError(f"{name} is {value}; expected {expected}")


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Raises ConfigurationError unless ``value`` is one of ``choices``; says which one may be meant."""
    if value in choices:
        return
    close = difflib.get_close_matches(str(value), choices, 1)
    guess = f" Did you mean {close[0]!r}?" if close else ""
    raise ConfigurationError(f"{name} is {value!r}; expected one of {', '.join(sorted(choices))}.{guess}")


def check_location(path: Any) -> None:
    """Raises ConfigurationError unless a log can lie at ``path``, as far as that is known without writing."""
    if not isinstance(path, str | os.PathLike | Store):
        raise ConfigurationError(
            f"the log's place is {path!r}; expected a folder, a URL or a zarr Store, such as "
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


def check_objective(objective: Any) -> None:
    """Raises ConfigurationError unless ``objective`` is None or has what probes need."""
    if objective is None or (callable(objective) and hasattr(objective, "num_timesteps")):
        return
    kind = type(objective).__name__
    hint = f": DiffusionObjective({kind.lower()}), say" if hasattr(objective, "add_noise") else ""
    raise ConfigurationError(
        f"objective is a {kind}; expected a loss that is called with (model, batch, timesteps, noise seeds), "
        f"such as DiffusionObjective(scheduler){hint}"
    )
