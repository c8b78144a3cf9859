"""A group's attributes: the commit mark of its rows, and what its writer says of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from zarr.abc.store import Store

from diffhook.errors import LogError
from diffhook.log import store as files
from diffhook.log.checksum import parse, verified, with_checksum


def read_mark(store: Store, path: str) -> dict[str, Any]:
    """The attributes of the group at ``path``; {} where it was only begun.

    Raises:
        LogError: they are damaged, or gone while there are rows.
    """
    place = f"{path}/zarr.json"
    content = files.get(store, place)
    if content is None:
        if any("/c/" in key for key in files.keys(store, path)):
            raise LogError(f"{place} is missing")
        return {}
    found = parse(content, place)
    attributes = found.get("attributes") if isinstance(found, dict) else None
    if not isinstance(attributes, dict) or found.get("node_type") != "group":
        raise LogError(f"{place} is damaged: no zarr group")
    fields = verified(attributes, place) if attributes else {}
    _check_attributes(fields, place)
    return fields


def put_attributes(store: Store, path: str, attributes: dict[str, Any]) -> None:
    """Write a group's own zarr.json: the commit mark of its rows."""
    files.put(store, f"{path}/zarr.json", mark_json(attributes))


def mark_json(attributes: dict[str, Any]) -> bytes:
    """What :func:`put_attributes` writes."""
    return group_json(with_checksum(attributes))


def group_json(attributes: dict[str, Any]) -> bytes:
    return json.dumps({"zarr_format": 3, "node_type": "group", "attributes": attributes}, indent=1).encode()


def _check_attributes(fields: dict[str, Any], place: str) -> None:
    sound = not fields or (
        _is_count(fields.get("committed"))
        and _are(fields.get("columns"), lambda name: isinstance(name, str))
        and _are(fields.get("lost", []), lambda r: _are(r, _is_count) and len(r) == 2 and r[0] <= r[1])
        and _are(fields.get("sessions", []), _is_session)
        and _are_in_order(fields.get("sessions", []))
    )
    if not sound:
        raise LogError(f"{place} is damaged: its attributes make no sense")


def _are(found: Any, sound: Callable[[Any], bool]) -> bool:
    return isinstance(found, list) and all(sound(item) for item in found)


def _is_count(found: Any) -> bool:
    return type(found) is int and 0 <= found <= 1 << 48


def _is_session(found: Any) -> bool:
    counts = ("dropped_steps", "dropped_rows", "dropped_snapshots")
    return (
        isinstance(found, dict)
        and all(_is_count(found.get(key, 0)) for key in counts)
        and all(_is_count(found.get(key)) for key in ("first_row", "start_step"))
        and isinstance(found.get("id"), str)
        and _is_count(found.get("processes", 0))
        and all(_are(found.get(key, []), _is_count) for key in ("snapshots", "lost_snapshots"))
        and "parent" in found
    )


def _are_in_order(sessions: list[dict[str, Any]]) -> bool:
    """A parent comes before its children, and every row is of one session."""
    firsts = [session["first_row"] for session in sessions]
    return (
        firsts[:1] in ([], [0])
        and all(low <= high for low, high in pairwise(firsts))
        and all(
            session["parent"] is None or (_is_count(session["parent"]) and session["parent"] < number)
            for number, session in enumerate(sessions)
        )
    )
