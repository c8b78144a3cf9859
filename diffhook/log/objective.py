"""What a log says of the training loss: the run's configuration, or what was recognised while it trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zarr.abc.store import Store

from diffhook.log import store as files
from diffhook.log.checksum import parse

OBJECTIVE = "objective.json"
"""{"objective": its description or null, "words": what was recognised, or why nothing was}."""


def read_objective(store: Store, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The loss's description; None where the log does not know it.

    Raises:
        LogError: the file is damaged.
    """
    given: dict[str, Any] | None = config["identity"].get("objective")
    if given is not None:
        return given
    found = _recorded(store).get("objective")
    return found if isinstance(found, dict) else None


def objective_words(store: Store, config: Mapping[str, Any]) -> str:
    """What the log knows of the loss, or why it knows nothing; "" where it says neither.

    Raises:
        LogError: the file is damaged.
    """
    if config["identity"].get("objective") is not None:
        return "as the hook was told"
    found = _recorded(store)
    told = "recognised" if isinstance(found.get("objective"), dict) else "not recognised"
    return f"{told}: {found['words']}" if isinstance(found.get("words"), str) else ""


def _recorded(store: Store) -> dict[str, Any]:
    content = files.get(store, OBJECTIVE)
    found = None if content is None else parse(content, f"{files.describe(store)}/{OBJECTIVE}")
    return found if isinstance(found, dict) else {}
