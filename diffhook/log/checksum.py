"""A checksum inside a JSON object: metadata decides which rows count, so it may not rot unseen."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

from diffhook.errors import LogError

_KEY = "crc32"


def with_checksum(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields and, under "crc32", the checksum of their canonical JSON."""
    return {**fields, _KEY: _checksum(fields)}


def verified(fields: Any, place: str) -> dict[str, Any]:
    """The fields without the checksum.

    Args:
        place: where they lie, for the message.

    Raises:
        LogError: no object, or the checksum is missing or wrong.
    """
    if not isinstance(fields, dict):
        raise LogError(f"{place} is damaged: expected a JSON object, found {type(fields).__name__}")
    content = {key: value for key, value in fields.items() if key != _KEY}
    try:
        whole = fields.get(_KEY) == _checksum(content)
    except (TypeError, ValueError, RecursionError) as error:
        raise LogError(f"{place} is damaged: {error}") from error
    if not whole:
        raise LogError(f"{place} is damaged: its checksum is missing or wrong")
    return content


def parse(content: bytes, place: str) -> Any:
    """JSON from a file that anyone may have written.

    Raises:
        LogError: it is none.
    """
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise LogError(f"{place} is damaged: no JSON ({error})") from error


def _checksum(fields: Mapping[str, Any]) -> str:
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return f"{zlib.crc32(text.encode()):08x}"
